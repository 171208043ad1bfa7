"""Quantizers as modules: for one's own loop, or as a parametrization of a layer's weight."""

from __future__ import annotations

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.compat import functional
from hdrq.compat.conventions import refuse_to_draw_again
from hdrq.rng import rng_state


class _Stepped(nn.Module):
    """A learned positive scale, and the integer range of so many bits."""

    scale: nn.Parameter
    quant_min: int
    quant_max: int

    def __init__(self, scale: torch.Tensor | float, *, bits: int, signed: bool = True, axis: int | None = None) -> None:
        super().__init__()
        scale = torch.as_tensor(scale, dtype=torch.float32).detach().clone().reshape(-1)
        checks.scale_values("scale", scale)
        if axis is None and scale.numel() != 1:
            raise ValueError(
                f"scale must have one element without an axis, got {scale.numel()}: axis=0 is that of rows"
            )
        self.scale = nn.Parameter(scale)
        bits = checks.bits("bits", bits)
        self.quant_min, self.quant_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.axis = axis

    def extra_repr(self) -> str:
        return f"quant_min={self.quant_min}, quant_max={self.quant_max}, axis={self.axis}"

    def grad_factor(self, x: torch.Tensor) -> float:
        """LSQ's ``1/sqrt(n·quant_max)``, n the elements that share a scale; 1 in ``eval()``, where a batch of any size
        must give one graph."""
        if not self.training:
            return 1.0
        return (max(x.numel(), 1) / self.scale.numel() * self.quant_max) ** -0.5


class LSQ(_Stepped):
    """A quantizer with a learned step: :func:`hdrq.compat.functional.lsq` with ``g = 1/sqrt(n·quant_max)``.

    Args:
        scale: the step to start from: one, or one for each of ``x.shape[axis]``. :func:`initial_scale` has the paper's.
        bits: 2 to 16.
        signed: the range is ``[−2^(b−1), 2^(b−1) − 1]``, else ``[0, 2^b − 1]``.
        axis: the axis of ``scale``; None for one.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.

    Example::

        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from hdrq.compat import LSQ
        >>> layer = torch.nn.Linear(8, 4)
        >>> step = LSQ.initial_scale(layer.weight, bits=4)
        >>> layer = parametrize.register_parametrization(layer, "weight", LSQ(step, bits=4))
        >>> len(layer.weight.detach().unique()) <= 16
        True
    """

    @staticmethod
    def initial_scale(x: torch.Tensor, *, bits: int, signed: bool = True, axis: int | None = None) -> torch.Tensor:
        """The paper's ``2·mean(|x|)/sqrt(quant_max)``, over all elements or over those of each channel."""
        quant_max = 2 ** (checks.bits("bits", bits) - signed) - 1
        rest = [i for i in range(x.ndim) if axis is None or i != checks.axis_of(x, axis)]
        mean = x.detach().float().abs().mean(rest) if rest else x.detach().float().abs()
        return (2 * mean / quant_max**0.5).reshape(-1).clamp(min=torch.finfo(torch.float32).tiny)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.lsq(x, self.scale, self.grad_factor(x), self.quant_min, self.quant_max, self.axis)


class NoiseQuantize(_Stepped):
    """A quantizer that adds noise in place of rounding while it trains, and rounds in ``eval()``.

    Each forward pass draws anew: the state of the noise is the buffer ``rng``, saved with the module, so that a seed
    repeats a run and a saved model continues it. A pass that activation checkpointing runs again is refused: it would
    draw anew.

    Args:
        scale, bits, signed, axis: as :class:`LSQ`.
        seed: of the noise. Modules of one model need seeds, or streams, of their own.
        stream: a second number for the same purpose, such as a layer's.
        noise: "uniform" or "empirical", as :func:`hdrq.ops.noise_quantize`.

    Source: HDRQ, ICML 2025.
    """

    rng: torch.Tensor

    def __init__(
        self,
        scale: torch.Tensor | float,
        *,
        bits: int,
        signed: bool = True,
        axis: int | None = None,
        seed: int = 0,
        stream: int = 0,
        noise: str = "uniform",
    ) -> None:
        super().__init__(scale, bits=bits, signed=signed, axis=axis)
        self.noise = checks.choice("noise", noise, ("uniform", "empirical"))
        self.register_buffer("rng", rng_state(seed, stream))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.quant_min, self.quant_max
        factor = self.grad_factor(x)
        if not self.training:
            return ops.fake_quantize(x, self.scale, *grid, axis=self.axis, grad_scale=factor)
        if not torch.compiler.is_compiling():
            refuse_to_draw_again()
        drawn = self.rng.clone()
        self.rng[2] += 1
        return ops.noise_quantize(x, self.scale, *grid, drawn, noise=self.noise, axis=self.axis, grad_scale=factor)
