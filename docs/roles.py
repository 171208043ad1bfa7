"""What docstrings have of reStructuredText, in Markdown.

Roles, ``:func:`hdrq.quantize` ``, become links where the site has the object. Of blocks that ``::`` introduces the
indentation is kept, and is enough.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`~?([\w.]+)`")
BLOCK = re.compile(r"::$", re.MULTILINE)


def linked(match: re.Match) -> str:
    name = match[1]
    return f'<autoref optional identifier="{name}"><code>{name}</code></autoref>'


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = BLOCK.sub(":", ROLE.sub(linked, obj.docstring.value))
