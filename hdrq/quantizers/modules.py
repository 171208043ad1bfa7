"""Weight and activation quantizers: modules that hold a scale, a range and a mode, and leave the maths to the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.rng import rng_state

MODES = ("float", "noise", "round")  # pass through; noise in place of rounding; fake-quantize


def mean_range(weights: Sequence[float], scales: Sequence[float], ranges: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Where the mean of quantizers has its range of integers: ``low* = round(Σ λ_k·s_k·low_k / Σ λ_k·s_k)``, its width
    that of the first. A range with a zero point inside is ``[−z, 2^b − 1 − z]``; equal ranges stay.

    Raises:
        ValueError: the mean scale is not positive.
    """
    steps = [w * s for w, s in zip(weights, scales, strict=True)]
    if not 0 < sum(steps) < math.inf:
        raise ValueError(f"the mean scale of an input must be positive and finite, got {sum(steps):g}")
    low = round(sum(step * each[0] for step, each in zip(steps, ranges, strict=True)) / sum(steps))
    return low, low + ranges[0][1] - ranges[0][0]


class Quantizer(nn.Module):
    """A scale, learned with LSQ's gradient factor, an integer range, and the random stream of its noise.

    Args:
        scale: float32, one element, or one for each index of ``axis``.
        qmin, qmax: the integer range.
        axis: the axis along which ``scale`` varies; None for one scale.
    """

    keep = 1.0  # the probability that an element is quantized

    def __init__(self, scale: torch.Tensor, qmin: int, qmax: int, axis: int | None = None) -> None:
        super().__init__()
        checks.quant_range(qmin, qmax)
        self.scale = nn.Parameter(scale)
        self.qmin, self.qmax, self.axis = qmin, qmax, axis
        self.mode = "round"
        self.noise = "uniform"
        self.rng = rng_state(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        checks.choice("mode", self.mode, MODES)
        if self.mode == "float":
            return x
        grid = (x, self.scale, self.qmin, self.qmax)
        largest = self.qmax if self.qmin >= -self.qmax - 1 else -self.qmin  # LSQ's Q_P; of a range with a zero point
        factor = 1 / math.sqrt(max(x.numel(), 1) * largest)
        if self.mode == "noise":
            return ops.noise_quantize(
                *grid, self.rng, noise=self.noise, axis=self.axis, grad_scale=factor, keep=self.keep
            )
        rng = self.rng if self.keep < 1 else None  # it lies where a learner put it, not where the module went
        return ops.fake_quantize(*grid, axis=self.axis, grad_scale=factor, keep=self.keep, rng=rng)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that ``x`` rounds to."""
        return ops.quantize(x, self.scale, self.qmin, self.qmax, axis=self.axis)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What integers stand for."""
        return ops.dequantize(codes, self.scale, axis=self.axis)

    def get_extra_state(self) -> torch.Tensor:
        """What a state dict holds beside the scale: ``qmin``, ``qmax``, and the axis if there is one.

        It is a tensor, so that any format of state dicts takes it. Files of :func:`hdrq.save` have it in the manifest.
        """
        facts = [self.qmin, self.qmax, *([] if self.axis is None else [self.axis])]
        return torch.tensor(facts, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the range and the axis of a state dict: a scale means nothing without them.

        Raises:
            TypeError, ValueError: it is not what :meth:`get_extra_state` returns.
        """
        if not isinstance(state, torch.Tensor) or state.numel() not in (2, 3) or state.is_floating_point():
            raise ValueError(f"extra state must be the tensor [qmin, qmax] or [qmin, qmax, axis], got {state}")
        qmin, qmax, *axis = (int(number) for number in state.flatten().tolist())
        checks.quant_range(qmin, qmax)
        self.qmin, self.qmax, self.axis = qmin, qmax, axis[0] if axis else None

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """As torch loads a module's own part, an error of which says whose part it is."""
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state of {prefix.rstrip('.') or 'the quantizer'}: {error}") from error

    def extra_repr(self) -> str:
        return f"range=[{self.qmin}, {self.qmax}], axis={self.axis}, mode={self.mode}"


class WeightQuantizer(Quantizer):
    """The parametrization of a layer's weight (:mod:`torch.nn.utils.parametrize`).

    ``alpha`` and ``beta`` are there while AdaRound is learned. ``dtype`` is the weight's, where what is learned has a
    finer one.
    Inside :func:`substituted` it returns a weight that was quantized elsewhere, together with those of other layers.
    """

    dtype: torch.dtype | None = None
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    substitute: torch.Tensor | None = None

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        y = self.substitute if self.substitute is not None else super().forward(w)
        return y if self.dtype is None else y.to(self.dtype)

    def adaround(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight rounded up or down as ``alpha`` says, softly, and the rounding loss for the exponent ``beta``."""
        grid = (w, self.scale, cast(torch.Tensor, self.alpha), self.qmin, self.qmax)
        return ops.adaround_regularized(*grid, cast(torch.Tensor, self.beta), axis=self.axis)


@contextmanager
def substituted(quantizers: Sequence[WeightQuantizer], weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the block, each quantizer returns the quantized weight that is given for it."""
    for quantizer, weight in zip(quantizers, weights, strict=True):
        quantizer.substitute = weight
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.substitute = None


class ActivationQuantizer(Quantizer):
    """The quantizer of a layer's input. While a block is reconstructed it leaves each element as it is with
    probability ``1 − keep`` (QDrop, Wei et al., ICLR 2022); the mask draws from the stream of the noise.
    """
