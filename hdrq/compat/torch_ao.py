"""The fake-quantize of ``torch.ao.quantization``, on our ops; docs/drop-in.md has where they differ."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.ao.quantization import FakeQuantize as _FakeQuantize
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

from hdrq.compat import functional

PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def scripted(forward: Callable) -> Callable:
    """The pass that TorchScript compiles, which cannot call our op: the class's own, under a name of its own."""
    return FunctionType(forward.__code__, forward.__globals__, "scripted")


class Observed:
    """The forward pass of a ``FakeQuantize``, of torch.ao or of torchao."""

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, and no strings
        scale: torch.Tensor
        zero_point: torch.Tensor
        observer_enabled: torch.Tensor
        fake_quant_enabled: torch.Tensor
        activation_post_process: Any
        qscheme: torch.qscheme
        ch_axis: int
        calculate_qparams: Callable
        scripted: Callable

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Observe and quantize X, as far as either is switched on. Its memory format stays."""
        return self.scripted(X) if torch.jit.is_scripting() else self.observed(X)

    def observed(self, X: torch.Tensor) -> torch.Tensor:
        """The pass outside of a script."""
        if X.dtype == torch.float64 or self.qscheme == torch.per_channel_affine_float_qparams:
            return super().forward(X)  # type: ignore[misc]
        if self.observer_enabled[0] == 1:
            self.activation_post_process(X.detach())
            found = self.calculate_qparams()
            for buffer, values in zip((self.scale, self.zero_point), found, strict=True):
                buffer.resize_(values.shape).copy_(values)
        if self.fake_quant_enabled[0] == 0:
            return X
        axis = self.ch_axis if self.qscheme in PER_CHANNEL else None
        observer = self.activation_post_process
        grid = self.scale, self.zero_point, observer.quant_min, observer.quant_max
        return functional.fake_quantize(X, *grid, axis, rounding="reciprocal")


class Learnable:
    """The quantization of a ``LearnableFakeQuantize``, of torch.ao or of torchao."""

    scale: Any
    zero_point: Any
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme
    ch_axis: int
    use_grad_scaling: bool

    def quantized(self, X: torch.Tensor, *, signed_scale: bool = False) -> torch.Tensor:
        if self.qscheme in SYMMETRIC:
            self.zero_point.data.zero_()
        factor = (max(X.numel(), 1) * self.quant_max) ** -0.5 if self.use_grad_scaling else 1.0
        axis = self.ch_axis if self.qscheme in PER_CHANNEL else None
        grid = self.scale, self.zero_point, self.quant_min, self.quant_max, axis, factor
        forms: dict[str, Any] = {"rounding": "reciprocal", "zero_point_rounding": "clamped"}
        return functional.fake_quantize(X, *grid, **forms, signed_scale=signed_scale)


class FakeQuantize(Observed, _FakeQuantize):
    """A ``torch.ao.quantization.FakeQuantize``, with its observer, switches, state and arguments, on our op.

    It computes by :func:`hdrq.ops.fake_quantize` in the order of torch's own op, ``rounding="reciprocal"``.

    float64 is computed by torch's own op. So is a zero point that is no integer (``per_channel_affine_float_qparams``).

    Example::

        >>> import torch
        >>> from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig
        >>> from hdrq.compat import FakeQuantize
        >>> own = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        >>> qconfig = QConfig(activation=own, weight=own.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127))
    """

    scripted = scripted(_FakeQuantize.forward)


class LearnableFakeQuantize(Learnable, _LearnableFakeQuantize):
    """A ``_LearnableFakeQuantize`` of torch.ao, on our op. Scale and zero point are parameters, which
    an observer estimates first, and a loss learns after ``enable_param_learning``.

    A scale below ``eps``, a negative one too, is raised to it before each forward pass. float64 is for torch's own op.
    """

    static_enabled: torch.Tensor
    fake_quant_enabled: torch.Tensor
    eps: torch.Tensor
    activation_post_process: Any

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Estimate or keep the grid, and quantize X, as far as either is switched on. Its memory format stays."""
        if X.dtype == torch.float64:
            return super().forward(X)
        if self.static_enabled[0] == 1:
            self.activation_post_process(X.detach())
            found = self.activation_post_process.calculate_qparams()
            for parameter, values in zip((self.scale, self.zero_point), found, strict=True):
                parameter.data.copy_(values)
        else:
            self.scale.data.clamp_(min=self.eps.item())
        return self.quantized(X) if self.fake_quant_enabled[0] == 1 else X
