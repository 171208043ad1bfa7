"""What an export says of itself: the file, and what each layer will be computed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Layer:
    """A product of a quantized weight: in integers, or in float and why."""

    name: str
    op: str
    why_float: str | None

    def __str__(self) -> str:
        return f"{self.name} ({self.op}): {'integers' if self.why_float is None else f'float: {self.why_float}'}"


@dataclass(frozen=True)
class Exported:
    """What was written, and what the runtime will compute each layer in.

    Attributes:
        layers: every product of a quantized weight, in order: its name, and why it will be float where it will.
        added: layers whose outputs were given 8-bit quantizers from data.
    """

    path: Path
    runtime: str
    layers: list[Layer]
    added: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def floats(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.why_float is not None]

    def __str__(self) -> str:
        integers = len(self.layers) - len(self.floats)
        lines = [f"{self.path}: for {self.runtime}, {integers} of {len(self.layers)} products in integers"]
        lines += [f"  {layer}" for layer in self.floats]
        lines += [f"  8-bit quantizers were added after {', '.join(self.added)}"] if self.added else []
        return "\n".join([*lines, *(f"  {text}" for text in self.warnings)])


def check_floats(layers: list[Layer], runtime: str) -> None:
    """Refuse layers that the runtime would compute in float.

    Raises:
        ValueError: names the first, and why.
    """
    floats = [layer for layer in layers if layer.why_float is not None]
    if floats:
        raise ValueError(
            f'layers must be computed in integers by runtime "{runtime}", got {floats[0]}'
            f"{f' and {len(floats) - 1} more' if len(floats) > 1 else ''}; allow_float=True lets it compute in float"
        )
