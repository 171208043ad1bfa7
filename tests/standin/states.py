"""Quantizer modules that do something else in another state, or under other numbers, than at their first call."""

import random

import torch
from torch import nn

from standin.quantizers import grad_scale, round_ste

ENABLED = True


class Quantizer(nn.Module):
    """Plain, with a scale and a zero point that an observer of somebody else's writes."""

    zero = 0

    def __init__(self, scale=0.25):
        super().__init__()
        self.quant_min, self.quant_max = -8, 7
        self.register_buffer("scale", torch.as_tensor(scale))
        self.register_buffer("zero_point", torch.tensor(float(self.zero)))

    def quantized(self, x, scale=None, zero=None):
        scale, zero = self.scale if scale is None else scale, self.zero_point if zero is None else zero
        return (torch.clamp(round_ste(x / scale) + zero, self.quant_min, self.quant_max) - zero) * scale

    def forward(self, x):
        return self.quantized(x)


class DroppingQuantizer(Quantizer):
    drop_prob = 1.0

    def forward(self, x):
        y = self.quantized(x)
        return y if self.drop_prob == 1.0 else torch.where(torch.rand_like(x) < self.drop_prob, y, x)


class ClampedZeroQuantizer(Quantizer):
    def forward(self, x):
        return self.quantized(x, zero=self.zero_point.clamp(self.quant_min, self.quant_max))


class ReciprocalQuantizer(Quantizer):
    def forward(self, x):
        return torch.clamp(round_ste(x * (1 / self.scale)), self.quant_min, self.quant_max) * self.scale


class ChannelQuantizer(Quantizer):
    ch_axis = 0

    def forward(self, x):
        scale = self.scale if self.scale.numel() == 1 else self.scale.reshape(-1, *[1] * (x.ndim - 1))
        return self.quantized(x, scale)


class SwitchedQuantizer(Quantizer):
    enabled = True

    def forward(self, x):
        return self.quantized(x) if type(self).enabled else x


class GlobalQuantizer(Quantizer):
    def forward(self, x):
        return self.quantized(x) if ENABLED else x


class GradModeQuantizer(Quantizer):
    def forward(self, x):
        return self.quantized(x) if torch.is_grad_enabled() else x


class OptionsQuantizer(Quantizer):
    def __init__(self):
        super().__init__()
        self.options = {"off": False}

    def forward(self, x):
        return x if self.options["off"] else self.quantized(x)


class MaskQuantizer(Quantizer):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 40))

    def forward(self, x):
        return self.quantized(x) * self.mask


class FloatSwitchQuantizer(Quantizer):
    def __init__(self):
        super().__init__()
        self.register_buffer("signed", torch.ones(1))

    def forward(self, x):
        low, high = (-8, 7) if self.signed == 1 else (0, 15)
        return torch.clamp(round_ste(x / self.scale), low, high) * self.scale


class RaisedQuantizer(Quantizer):
    def forward(self, x):
        self.scale.data.clamp_(min=0.1)
        return self.quantized(x)


class DrawingQuantizer(Quantizer):
    def forward(self, x):
        torch.rand(1)
        return self.quantized(x) * (1 if random.random() < 2 else 0)


class SampleFactorQuantizer(Quantizer):
    """LSQ's factor, of one sample."""

    def __init__(self):
        super().__init__()
        scale = self.scale
        del self.scale
        self.scale = nn.Parameter(scale)

    def forward(self, x):
        return self.quantized(x, grad_scale(self.scale, (x[0].numel() * 7) ** -0.5))


class HoldingQuantizer(Quantizer):
    """With a child, of which every call counts."""

    def __init__(self):
        super().__init__()
        self.observer, self.seen = nn.Identity(), 0
        self.observer.register_forward_hook(lambda *_: setattr(self, "seen", self.seen + 1))

    def forward(self, x):
        return self.quantized(self.observer(x))


def fake_quantize_while_enabled(x, scale, zero_point, quant_min, quant_max):
    if not ENABLED:
        return x
    return (torch.clamp(round_ste(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale
