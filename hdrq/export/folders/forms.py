"""How a folder of transformers holds one quantized weight: which tensors, and what integers and scales they mean.

A weight is ``(N, K)``, outputs by inputs, as ``nn.Linear`` has it, and ``W = (code − z)·Δ`` with codes of b bits in
``[−2^(b−1), 2^(b−1) − 1]``: what a format counts from 0 is less ``2^(b−1)`` here, its zero points too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from hdrq import checks, ops
from hdrq.checkpoint.format import packs
from hdrq.export.folders.words import from_awq, pack_words, to_awq, unpack_words

Read = Callable[[str], torch.Tensor]  # gives a folder's tensor of a name


@dataclass(frozen=True)
class Form:
    """One weight of a folder.

    Args:
        name: of the layer.
        tensors: the names that its tensors have in the folder, by what they are.
        group_size: inputs that share a scale; None for one of each output, or of the whole weight.
        axis: 0 for a scale of each output, None for groups, or one scale.
        affine: whether it has zero points.
        order: columns in the order of their groups, where these are not neighbours (act-order); codes are in that
            order here.
    """

    name: str
    tensors: Mapping[str, str]
    bits: int
    shape: tuple[int, int]
    group_size: int | None
    axis: int | None
    affine: bool
    order: torch.Tensor | None = field(default=None, compare=False)

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of the weight."""
        facts: dict[str, Any] = {"range": [self.low, -self.low - 1], "axis": self.axis, "shape": list(self.shape)}
        if self.affine:
            facts["affine"] = True
        return facts if self.group_size is None else {**facts, "group_size": self.group_size}

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the scales in a file of hdrq."""
        outputs, inputs = self.shape
        if self.group_size is not None:
            return outputs, inputs // self.group_size
        return (1,) if self.axis is None else (outputs,)

    def stored(self, part: str, read: Read) -> torch.Tensor:
        """``"codes"``, ``"scale"`` or ``"zero_point"`` as a file of hdrq holds it."""
        if part == "scale":
            return self.scale(read).float().reshape(self.grid).contiguous()
        if part == "zero_point":
            zero_point = (self.zero_point(read).to(torch.int32) + self.low).reshape(self.grid).contiguous()
            checks.code_values(f"zero points of {self.name}", zero_point, self.low, -self.low - 1)
            return zero_point
        if self._nibbles:
            return (self.words(read).contiguous().view(torch.uint8) ^ 0x88).flatten()
        counted = self.counted(read)
        counted = counted if self.order is None else counted[:, self.order]
        codes = counted.to(torch.int8) + self.low if self.bits < 8 else (counted ^ 0x80).view(torch.int8)
        return ops.pack(codes) if packs(self.low, -self.low - 1) else codes.contiguous()

    def written(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, like: Mapping) -> dict:
        """A weight's tensors by name, from what a file of hdrq holds; ``like``: the dtype of each in the folder."""
        zeros = None if zero_point is None else zero_point.reshape(self.grid) - self.low
        tensors = self.of_grid(scale.reshape(self.grid), zeros)
        if self._nibbles:
            tensors |= self.of_words((codes ^ 0x88).view(torch.int32).view(self.shape[0], -1))
        else:
            codes = ops.unpack(codes, self.shape, signed=True) if codes.dtype == torch.uint8 else codes
            counted = (codes.to(torch.int16) - self.low).to(torch.uint8)
            if self.order is not None:
                counted = torch.empty_like(counted).index_copy_(1, self.order, counted)
            tensors |= self.of_codes(counted)
        name = self.tensors["scale"]
        tensors[name] = rounded(name, tensors[name], like[name])
        return tensors

    @property
    def _nibbles(self) -> bool:
        """Whether the words of a row are bytes of :func:`hdrq.ops.pack`, but for the sign of each nibble."""
        return self.in_words and self.bits == 4 and self.shape[1] % 8 == 0 and self.order is None

    @property
    def in_words(self) -> bool:
        """Whether codes lie in words along the inputs."""
        return True

    def words(self, read: Read) -> torch.Tensor:
        """The words of the codes, int32 ``(N, W)``."""
        raise NotImplementedError

    def of_words(self, words: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse."""
        raise NotImplementedError

    def counted(self, read: Read) -> torch.Tensor:
        """The codes from 0 on, uint8 ``(N, K)``, columns in the order of the weight's."""
        return unpack_words(self.words(read), self.bits, self.shape[1])

    def of_codes(self, counted: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse."""
        return self.of_words(pack_words(counted, self.bits))

    def scale(self, read: Read) -> torch.Tensor:
        """The scales in any dtype, in the order of :attr:`grid`."""
        return read(self.tensors["scale"])

    def zero_point(self, read: Read) -> torch.Tensor:
        """The zero points counted from 0 on, in the order of :attr:`grid`."""
        raise NotImplementedError

    def of_grid(self, scale: torch.Tensor, zeros: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The inverse of both; ``zeros`` are None for a symmetric weight."""
        raise NotImplementedError


def rounded(name: str, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the dtype of a folder.

    Raises:
        ValueError: one becomes 0 or infinite there.
    """
    result = scale.to(dtype)
    wrong = ~(result.isfinite() & (result > 0))
    if wrong.any():
        raise ValueError(
            f"{name} must fit {checks.short(dtype)}, got {float(scale[wrong][0]):g}; take a template whose scales are "
            "float32, or the file of hdrq"
        )
    return result


@dataclass(frozen=True)
class Compressed(Form):
    """compressed-tensors' ``pack-quantized`` and ``int-quantized``.

    Args:
        padded: words are filled as versions of 2024 filled those of 3, 5, 6 and 7 bits: with whole integers.
    """

    padded: bool = False

    @property
    def in_words(self) -> bool:
        return "packed" in self.tensors

    def words(self, read: Read) -> torch.Tensor:
        return read(self.tensors["packed"])

    def of_words(self, words: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.tensors["packed"]: words}

    def counted(self, read: Read) -> torch.Tensor:
        if self.in_words:
            return unpack_words(self.words(read), self.bits, self.shape[1], padded=self.padded)
        codes = read(self.tensors["weight"])
        checks.code_values(self.tensors["weight"], codes, self.low, -self.low - 1)
        return (codes.to(torch.int16) - self.low).to(torch.uint8)

    def of_codes(self, counted: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.in_words:
            return self.of_words(pack_words(counted, self.bits, padded=self.padded))
        return {self.tensors["weight"]: (counted.to(torch.int16) + self.low).to(torch.int8)}

    def zero_point(self, read: Read) -> torch.Tensor:
        value = read(self.tensors["zero_point"])
        if not self.in_words:
            return value.to(torch.int32) - self.low
        return unpack_words(value.t(), self.bits, self.shape[0], padded=self.padded).t()

    def of_grid(self, scale: torch.Tensor, zeros: torch.Tensor | None) -> dict[str, torch.Tensor]:
        columns = (-1, 1) if self.axis == 0 else self.grid
        tensors = {self.tensors["scale"]: scale.view(columns)}
        if zeros is not None and self.in_words:
            words = pack_words(zeros.view(columns).t().contiguous(), self.bits, padded=self.padded)
            tensors[self.tensors["zero_point"]] = words.t().contiguous()
        elif zeros is not None:
            tensors[self.tensors["zero_point"]] = (zeros + self.low).to(torch.int8).view(columns)
        return tensors


@dataclass(frozen=True)
class Gptq(Form):
    """GPTQ's ``qweight`` (K·b/32, N), ``qzeros`` (K/g, N·b/32), ``scales`` (K/g, N). A symmetric weight has the zero
    point ``2^(b−1)`` everywhere.

    Args:
        less: what stored zero points are less than the real ones: 1 in the format ``gptq``, 0 in ``gptq_v2``.
    """

    less: int = 0

    def words(self, read: Read) -> torch.Tensor:
        if not self.affine:
            zeros = self.stored_zeros(read)
            wrong = zeros != -self.low - self.less
            if wrong.any():
                raise ValueError(
                    f"{self.tensors['zeros']} must be {-self.low - self.less} everywhere for a symmetric weight, got "
                    f"{int(zeros[wrong][0])}; the folder's sym must be false"
                )
        return read(self.tensors["words"]).t()

    def of_words(self, words: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.tensors["words"]: words.t().contiguous()}

    def stored_zeros(self, read: Read) -> torch.Tensor:
        return unpack_words(read(self.tensors["zeros"]), self.bits, self.shape[0]).t()

    def zero_point(self, read: Read) -> torch.Tensor:
        zeros = self.stored_zeros(read).to(torch.int32) + self.less
        if self.less and int(zeros.max()) == 2**self.bits:
            raise ValueError(
                f"{self.tensors['zeros']} must hold zero points of 1 to {2**self.bits - 1}, got one that is 0 or "
                f"{2**self.bits}, which checkpoint_format gptq does not tell apart; write the folder as gptq_v2"
            )
        return zeros

    def scale(self, read: Read) -> torch.Tensor:
        return read(self.tensors["scale"]).t()

    def of_grid(self, scale: torch.Tensor, zeros: torch.Tensor | None) -> dict[str, torch.Tensor]:
        rows = (self.shape[0], -1)
        tensors = {self.tensors["scale"]: scale.view(rows).t().contiguous()}
        if zeros is not None:
            stored = zeros.view(rows) - self.less
            if int(stored.min()) < 0:
                raise ValueError(f"zero points of {self.name} must be 1 or more for checkpoint_format gptq, got 0")
            tensors[self.tensors["zeros"]] = pack_words(stored.t().contiguous(), self.bits)
        return tensors


@dataclass(frozen=True)
class Awq(Form):
    """AWQ's (gemm) ``qweight`` (K, N/8), ``qzeros`` (K/g, N/8) with shuffled nibbles, ``scales`` (K/g, N)."""

    @property
    def in_words(self) -> bool:
        return False  # they lie along the outputs

    def counted(self, read: Read) -> torch.Tensor:
        return from_awq(unpack_words(read(self.tensors["words"]), self.bits, self.shape[0])).t()

    def of_codes(self, counted: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.tensors["words"]: pack_words(to_awq(counted.t()), self.bits)}

    def scale(self, read: Read) -> torch.Tensor:
        return read(self.tensors["scale"]).t()

    def zero_point(self, read: Read) -> torch.Tensor:
        return from_awq(unpack_words(read(self.tensors["zeros"]), self.bits, self.shape[0])).t()

    def of_grid(self, scale: torch.Tensor, zeros: torch.Tensor | None) -> dict[str, torch.Tensor]:
        rows = (self.shape[0], -1)
        words = pack_words(to_awq(cast(torch.Tensor, zeros).view(rows).t()), self.bits)
        return {self.tensors["scale"]: scale.view(rows).t().contiguous(), self.tensors["zeros"]: words}
