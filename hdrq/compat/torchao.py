"""The fake-quantize of ``torchao.quantization.pt2e``, on our ops, for its ``prepare_qat_pt2e`` and ``convert_pt2e``.

torchao tells its own observers and fake-quantizes from torch.ao's by class, so one class cannot serve both. Differences
are those of :mod:`hdrq.compat.torch_ao`. torchao is no requirement of hdrq: install it beside.
"""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.fake_quantize import FakeQuantize as _FakeQuantize
from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize as _LearnableFakeQuantize

from hdrq.compat.torch_ao import Learnable, Observed, scripted


class FakeQuantize(Observed, _FakeQuantize):
    """A ``torchao.quantization.pt2e.FakeQuantize``, with its observer, switches, state and arguments, on our op."""

    scripted = scripted(_FakeQuantize.forward)


class LearnableFakeQuantize(Learnable, _LearnableFakeQuantize):
    """A ``LearnableFakeQuantize`` of torchao, on our op. Scale and zero point are parameters from the first call on,
    which an observer estimates, and a loss learns after ``enable_range_learning``.

    float64 is for torch's own op. A scale that is learned to be negative is computed as torch's op does, by two more
    passes; on a GPU, where no value is read, it gives NaN.
    """

    observer_enabled: torch.Tensor
    fake_quant_enabled: torch.Tensor
    activation_post_process: Any

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Estimate or keep the grid, and quantize X, as far as either is switched on. Its memory format stays."""
        if X.dtype == torch.float64:
            return super().forward(X)
        if self.observer_enabled[0] == 1 or not self._initialized:
            self.activation_post_process(X.detach())
            self._initialize_or_update_qparams(*self.activation_post_process.calculate_qparams())
        if self.fake_quant_enabled[0] == 0:
            return X
        return self.quantized(X, signed_scale=X.is_cpu and bool((self.scale.detach() < 0).any()))
