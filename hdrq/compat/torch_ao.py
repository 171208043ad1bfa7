"""The fake-quantize of ``torch.ao.quantization``, on our ops."""

from __future__ import annotations

import torch
from torch.ao.quantization import FakeQuantize as _FakeQuantize

from hdrq.compat import functional

PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine, torch.per_channel_affine_float_qparams)


class FakeQuantize(_FakeQuantize):
    """Works wherever ``torch.ao.quantization.FakeQuantize`` does: it is one, with its observer, switches, state and
    arguments, and computes by :func:`hdrq.ops.fake_quantize` in the order of torch's own op, ``rounding="reciprocal"``.

    float64 is computed by torch's own op. So is a zero point that is no integer (``per_channel_affine_float_qparams``).

    Example::

        >>> import torch
        >>> from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig
        >>> from hdrq.compat import FakeQuantize
        >>> own = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        >>> qconfig = QConfig(activation=own, weight=own.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127))
    """

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Observe and quantize X, as far as either is switched on. Its memory format stays."""
        if X.dtype == torch.float64 or self.qscheme == torch.per_channel_affine_float_qparams:
            return super().forward(X)
        if self.observer_enabled[0] == 1:
            self._observe(X.detach())
        if self.fake_quant_enabled[0] == 0:
            return X
        axis = self.ch_axis if self.qscheme in PER_CHANNEL else None
        observer = self.activation_post_process
        grid = self.scale, self.zero_point, observer.quant_min, observer.quant_max
        y = functional.fake_quantize(X, *grid, axis, rounding="reciprocal")
        return y.contiguous(memory_format=torch.channels_last) if _channels_last(X) else y

    def _observe(self, x: torch.Tensor) -> None:
        self.activation_post_process(x)
        found = self.calculate_qparams()
        for buffer, values in zip((self.scale, self.zero_point), found, strict=True):
            buffer.resize_(values.shape).copy_(values)


def _channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
