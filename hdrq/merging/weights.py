"""The real weights that a model has, by the names that a state dict gives them, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Protocol

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.backends.eager import per_element
from hdrq.backends.reference.systematic import GROUP
from hdrq.checkpoint.format import Reader, Spec
from hdrq.export.folders.reading import UNLOADABLE
from hdrq.merging.sources import Source, State
from hdrq.quantizers.layers import output_axis

AT_ONCE = 2**18  # elements of a slab: its float64 values stay in the cache


class Rows(Protocol):
    """A tensor as a matrix, its first axis by all others, whose values are made as they are asked for."""

    def rows(self, some: slice) -> torch.Tensor:
        """The values of some rows, (n, width) in float64."""


class Named(Protocol):
    """Tensors by name, of which :class:`Rows` are read one at a time."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The dtype and shape that a state dict has of each."""

    def read(self, name: str) -> Rows: ...


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Rows that part a tensor into slabs of some ``AT_ONCE`` elements, each of which begins a group of 1,024."""
    height, width = matrix_shape(shape)
    unit = GROUP // gcd(GROUP, max(width, 1))
    step = unit * max(1, AT_ONCE // (unit * max(width, 1)))
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The first axis, and all others as one."""
    return (shape[0], prod(shape[1:])) if len(shape) else (1, 1)


def as_matrix(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(matrix_shape(value.shape))


@dataclass(frozen=True)
class Plain:
    """A tensor of numbers."""

    value: torch.Tensor

    def rows(self, some: slice) -> torch.Tensor:
        return as_matrix(self.value)[some].double()


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: ``(code − z)·Δ``.

    ``order`` are the columns that its codes have, where those of a group are no neighbours (act-order of GPTQ).
    """

    codes: torch.Tensor  # not packed
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    facts: Mapping[str, Any]  # of a manifest
    order: torch.Tensor | None = None

    def rows(self, some: slice) -> torch.Tensor:
        return (self.integers(some) - self.zero(some)) * self.step(some)

    def integers(self, some: slice) -> torch.Tensor:
        """The codes of some rows, (n, width) in float64."""
        return as_matrix(self.codes)[some].double()

    def step(self, some: slice) -> torch.Tensor:
        """Δ of some rows, in float64, of a shape that broadcasts over (n, width)."""
        return self._spread(self.scale, some)

    def zero(self, some: slice) -> torch.Tensor:
        """z of some rows, as :meth:`step`."""
        return self._spread(torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point, some)

    def _spread(self, values: torch.Tensor, some: slice) -> torch.Tensor:
        """One number for each scale, as it meets the elements of some rows."""
        values, axis, size = values.double(), self.facts["axis"], self.facts.get("group_size")
        if size is not None:
            return values.reshape(len(self.codes), -1)[some].repeat_interleave(size, 1)
        if axis is None:
            return values.reshape(1, 1)
        spread = per_element(values, self.codes.ndim, checks.axis_of(self.codes, axis))
        if len(spread) > 1:
            return spread.flatten(1)[some]
        return spread.expand(1, *self.codes.shape[1:]).reshape(1, -1)


@dataclass(frozen=True)
class Reordered:
    """A matrix with its columns in another order."""

    matrix: Rows
    order: torch.Tensor

    def rows(self, some: slice) -> torch.Tensor:
        return self.matrix.rows(some)[:, self.order]


@dataclass(frozen=True)
class Product:
    """``scale·L·R``: what a LoRA adapter adds to a weight."""

    left: torch.Tensor  # (rows, r)
    right: torch.Tensor  # (r, width)
    scale: float

    def rows(self, some: slice) -> torch.Tensor:
        return (self.left[some].double() @ self.right.double()) * self.scale


@dataclass(frozen=True)
class Difference:
    """``scale·(a − b)``, or ``scale·a``."""

    a: Rows
    b: Rows | None
    scale: float

    def rows(self, some: slice) -> torch.Tensor:
        value = self.a.rows(some)
        return (value if self.b is None else value - self.b.rows(some)) * self.scale


@dataclass(frozen=True)
class Total:
    """A sum."""

    parts: Sequence[Rows]

    def rows(self, some: slice) -> torch.Tensor:
        total = self.parts[0].rows(some)
        for part in self.parts[1:]:
            total = total + part.rows(some)
        return total


@dataclass(frozen=True)
class Agreed:
    """Changes of a weight under each of its names, which must be one."""

    name: str
    parts: Sequence[Rows]

    def rows(self, some: slice) -> torch.Tensor:
        first, *others = (part.rows(some) for part in self.parts)
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"changes of {self.name} must be one for all layers that share it, got others under its other "
                "names; give one name, or quantize a model that does not tie them"
            )
        return first


@dataclass(frozen=True)
class Tensors:
    """Tensors in memory, or in files that are read as they are asked for."""

    specs: Mapping[str, Spec]
    take: Callable[[str], torch.Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return cls({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, lambda n: tensors[n].detach().cpu())

    def read(self, name: str) -> Rows:
        return Plain(self.take(name))


class Weights:
    """The weights of a quantized model, and its other tensors but the scales of activations.

    ``layers`` are the names of quantized weights, each with its layer, and ``owners`` those of weights that are
    another's. ``model`` is the model itself, where it is at hand.
    """

    def __init__(self, source: Source, model: nn.Module | None = None) -> None:
        self.source, self.model, manifest = source, model, source.manifest
        self.layers = {weight_name(layer): layer for layer in manifest["weights"]}
        self.owners = {weight_name(tied): weight_name(owner) for tied, owner in manifest["tied"].items()}
        parts = {f"{layer}.weight.{part}" for layer in manifest["weights"] for part in ("codes", "scale", "zero_point")}
        parts |= {f"{layer}{UNLOADABLE}" for layer in manifest["weights"]}
        parts |= {f"{name}.input.scale" for name in manifest["inputs"]}
        self.plain = {name: spec for name, spec in source.specs.items() if name not in parts}
        quantized = {n: (torch.float32, tuple(manifest["weights"][layer]["shape"])) for n, layer in self.layers.items()}
        self.specs: dict[str, Spec] = {**quantized, **{n: quantized[o] for n, o in self.owners.items()}, **self.plain}

    def quantized(self, name: str) -> Quantized:
        """A quantized weight.

        Raises:
            ValueError: a code or a scale is out of its range.
        """
        layer = self.layers[self.owners.get(name, name)]
        facts = self.source.manifest["weights"][layer]
        (low, high), tensor = facts["range"], self.source.tensor
        codes, scale = tensor(f"{layer}.weight.codes").cpu(), tensor(f"{layer}.weight.scale").cpu()
        codes = ops.unpack(codes, facts["shape"], signed=low < 0) if codes.dtype == torch.uint8 else codes
        checks.code_values(f"codes of {layer}", codes, low, high)
        checks.scale_values(f"{layer}.weight.scale", scale)
        zero = tensor(f"{layer}.weight.zero_point").cpu() if facts.get("affine") else None
        groups = f"{layer}{UNLOADABLE}"
        order = tensor(groups).long().argsort(stable=True) if groups in self.source.specs else None
        return Quantized(codes, scale, zero, facts, order)

    def read(self, name: str) -> Rows:
        if name in self.plain:
            return Plain(self.source.tensor(name).cpu())
        weight = self.quantized(name)
        return weight if weight.order is None else Reordered(weight, weight.order.argsort())

    def output_axis(self, name: str) -> int | None:
        """The axis of a weight along which its layer's outputs lie; None where a file alone does not say."""
        if self.model is not None:
            return output_axis(self.model.get_submodule(name.rpartition(".")[0]))
        layer = self.layers.get(self.owners.get(name, name))
        facts = {"axis": None} if layer is None else self.source.manifest["weights"][layer]
        return 0 if facts.get("group_size") is not None else facts["axis"]

    def same(self, name: str) -> list[str]:
        """The names of a weight: its own, and those of layers that share it.

        A file says so of quantized weights. Of matrices in float equal numbers say it, in memory one place.
        """
        owner = self.owners.get(name, name)
        if owner in self.layers:
            return [owner, *(tied for tied, other in self.owners.items() if other == owner)]
        if len(self.plain[name][1]) < 2:
            return [name]
        return [name, *(other for other in self.plain if other != name and self._equal(name, other))]

    def _equal(self, name: str, other: str) -> bool:
        if self.plain[name] != self.plain[other]:
            return False
        if isinstance(self.source, Reader):
            hashes = self.source.manifest["sha256"]
            return hashes[name] == hashes[other]
        a, b = self.source.tensor(name), self.source.tensor(other)
        return a.data_ptr() == b.data_ptr() if isinstance(self.source, State) else torch.equal(a, b)


def weight_name(layer: str) -> str:
    """The name of a layer's weight in a state dict; the model itself may be the layer."""
    return f"{layer}.weight".removeprefix(".")
