"""Bit widths: how they are written, which layer gets which, and the integers they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from hdrq import checks
from hdrq.checks import listed

EDGE_BITS = 8  # of the first and the last layer, unless a pattern of the caller's says otherwise


@dataclass(frozen=True)
class BitWidths:
    """Bit widths of a layer's weight and of its input, 2 to 16 each."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str) -> BitWidths:
        """``"W4A8"``: 4-bit weights, 8-bit activations."""
        match = re.fullmatch(r"W(\d+)A(\d+)", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'bits must be written like "W4A4", got {text!r}')
        weight, activation = (int(group) for group in match.groups())
        return cls(checks.bits("weight bits", weight), checks.bits("activation bits", activation))


@dataclass(frozen=True)
class Budget:
    """Bits of weights that are chosen layer by layer, so many in the mean, and the bits of activations."""

    weight: float
    activation: int = 8

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"auto:W4.5A4"``; ``"auto:4.5"`` has 8-bit activations."""
        match = re.fullmatch(r"auto:(?:W(\d+(?:\.\d+)?)A(\d+)|(\d+(?:\.\d+)?))", text)
        if match is None:
            raise ValueError(f'bits must be written like "auto:4.5" or "auto:W4.5A8", got {text!r}')
        paired, activation, alone = match.groups()
        weight = checks.real("weight bits", float(paired or alone), 2.0, 16.0)
        return cls(weight, cls.activation if activation is None else checks.bits("activation bits", int(activation)))


def budget_of(bits: str | Mapping[str, str]) -> Budget | None:
    """The budget that ``bits``, or a pattern of it, asks for; None where every width is given.

    Raises:
        ValueError: two patterns ask for different ones.
    """
    texts = {text for text in ([bits] if isinstance(bits, str) else bits.values()) if is_automatic(text)}
    if len(texts) > 1:
        raise ValueError(f"bits must have one budget, got {listed(sorted(texts))}")
    return Budget.parse(texts.pop()) if texts else None


def is_automatic(text: Any) -> bool:
    """Whether bits of weights are to be chosen: ``"auto:…"``."""
    return isinstance(text, str) and text.startswith("auto:")


def recorded(bits: str | Mapping[str, str]) -> str | list[list[str]]:
    """``bits`` as JSON keeps them: patterns as pairs, whose order decides."""
    return bits if isinstance(bits, str) else [list(pair) for pair in bits.items()]


def check_bits(bits: Any) -> None:
    """``bits`` is a text of bit widths or a budget, or patterns with such texts: what is known before a model is.

    Raises:
        TypeError, ValueError: "bits must be …, got …".
    """
    if not isinstance(bits, str | Mapping):
        raise TypeError(f'bits must be a string like "W4A4" or a mapping from patterns, got {type(bits).__name__}')
    check_patterns("bits", {} if isinstance(bits, str) else bits)
    for text in [bits] if isinstance(bits, str) else bits.values():
        if not is_automatic(text) and (text != "float" or isinstance(bits, str)):
            BitWidths.parse(text)
    budget_of(bits)


def check_patterns(name: str, patterns: Mapping[Any, Any]) -> None:
    """Every pattern is a text.

    Raises:
        TypeError: one is not.
    """
    if odd := [repr(pattern)[:50] for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"{name} must have patterns of names, got {listed(odd)}")


def bit_policy(
    layers: list[str], bits: str | Mapping[str, str], shared: Sequence[Sequence[str]] = ()
) -> dict[str, BitWidths | None]:
    """The bits of each layer, in execution order: the first pattern of ``bits`` that matches decides. None: in float.

    A string is the pattern ``"*"``; then the first and the last layer take 8 bits. Patterns are those of a shell, and
    match a layer's name or that of a module it lies in: ``"stem"`` is for all of the stem.

    ``shared`` are the names of layers that share a weight. Where ``bits`` is a string, the weight takes the widest of
    their widths, and each layer's input keeps its own.

    Raises:
        TypeError: ``bits`` is neither a string nor a mapping.
        ValueError: a pattern matches no layer, or a layer no pattern; patterns give a shared weight two widths.
    """
    check_bits(bits)
    if budget_of(bits) is not None:
        raise ValueError(f"bits must be widths here, got {bits!r}; hdrq.sensitivity finds them for each layer")
    if isinstance(bits, str):
        edge = BitWidths(EDGE_BITS, EDGE_BITS)
        inner = BitWidths.parse(bits)
        widths = {name: edge if name in (layers[0], layers[-1]) else inner for name in layers}
        for names in shared:
            widest = max(widths[name].weight for name in names)
            widths |= {name: replace(widths[name], weight=widest) for name in names}
        return dict(widths)
    patterns = {pattern: None if text == "float" else BitWidths.parse(text) for pattern, text in bits.items()}
    for pattern, own in patterns.items():
        if own is not None and not any(matches(name, pattern) for name in layers):
            known = ", ".join(layers)
            raise ValueError(f"bits must have patterns that match a layer, got {pattern!r}; layers: {known}")
    policy = {}
    for name in layers:
        chosen = next((p for p in patterns if matches(name, p)), None)
        if chosen is None:
            raise ValueError(f'bits must have a pattern for every layer (end with "*"), got none for {name!r}')
        policy[name] = patterns[chosen]
    for names in shared:
        texts = {name: "float" if (own := policy[name]) is None else f"{own.weight} bits" for name in names}
        if len(set(texts.values())) > 1:
            got = listed(f"{text} for {name!r}" for name, text in texts.items())
            raise ValueError(f"bits must agree where layers share a weight, got {got}; give them one width of weights")
    return policy


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is for a module of this name, or for one that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1)) or fnmatchcase(
        name, pattern
    )


def bits_around(name: str, policy: Mapping[str, BitWidths | None]) -> BitWidths | None:
    """The first of the layers in a module, or of those nearest around it, that is quantized."""
    inside = [bits for layer, bits in policy.items() if not name or layer == name or layer.startswith(f"{name}.")]
    if not inside:
        return bits_around(name.rpartition(".")[0], policy)
    return next((bits for bits in inside if bits is not None), None)


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """``(−2^(b−1), 2^(b−1) − 1)``, or ``(0, 2^b − 1)``."""
    checks.bits("bits", bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
