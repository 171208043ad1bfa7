"""YAML as settings are written in: numbers like 1e-3, no name twice, no aliases."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

DEEPEST = 20  # levels: a parser's time grows with their square
POWER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")  # YAML 1.1 wants a point, and a sign of the exponent


class _Loader(yaml.SafeLoader):
    """What a safe loader makes of a text, but for names that come twice, of which it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"it must have each name once, got {twice[0][:100]!r} more often")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the loader would take for a number."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", POWER, list("-+0123456789"))


def yaml_of(settings: Mapping[str, Any]) -> str:
    """A text that :func:`parse_yaml` makes the settings of again, in their order."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False)


def path_of(text: str) -> str:
    """A file's name of a YAML file, which is UTF-8, as the system takes it: in the locale C it would be ASCII."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def parse_yaml(text: str) -> Any:
    """What a text of YAML holds, without aliases, a few of which can stand for billions of values.

    Raises:
        ValueError, yaml.YAMLError: it is no YAML, too deep, or has a name twice in one mapping.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it must have no aliases (*name), got one; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it must have at most {DEEPEST} levels, got more")
    return yaml.load(text, Loader=_Loader)  # a safe loader
