"""Quantizer modules as BRECQ, QDrop, MQBench and LSQ layers have them, their arithmetic written out."""

import math

import torch
from torch import nn

from standin.quantizers import grad_scale, round_ste


class UniformAffineQuantizer(nn.Module):
    """Searches its scale at the first call."""

    def __init__(self, n_bits=8, channel_wise=False, leaf_param=False):
        super().__init__()
        self.n_levels, self.channel_wise, self.leaf_param = 2**n_bits, channel_wise, leaf_param
        self.delta, self.zero_point, self.inited = None, None, False

    def forward(self, x):
        if not self.inited:
            rows = x.detach().flatten(1) if self.channel_wise else x.detach().reshape(1, -1)
            low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
            shape = (-1, *[1] * (x.ndim - 1)) if self.channel_wise else ()
            delta = ((high - low) / (self.n_levels - 1)).reshape(shape)
            self.delta = nn.Parameter(delta) if self.leaf_param else delta
            self.zero_point = (-low / delta.flatten()).round().reshape(shape)
            self.inited = True
        q = torch.clamp(round_ste(x / self.delta) + self.zero_point, 0, self.n_levels - 1)
        return (q - self.zero_point) * self.delta


class AdaRoundQuantizer(nn.Module):
    """Rounding up or down of a weight, learned."""

    def __init__(self, quantizer, weight):
        super().__init__()
        self.n_levels, self.delta, self.zero_point = quantizer.n_levels, quantizer.delta, quantizer.zero_point
        self.gamma, self.zeta, self.soft_targets = -0.1, 1.1, True
        rest = weight / self.delta - torch.floor(weight / self.delta)
        self.alpha = nn.Parameter(-torch.log((self.zeta - self.gamma) / (rest - self.gamma) - 1))

    def get_soft_targets(self):
        return torch.clamp(torch.sigmoid(self.alpha) * (self.zeta - self.gamma) + self.gamma, 0, 1)

    def forward(self, x):
        up = self.get_soft_targets() if self.soft_targets else (self.alpha >= 0).float()
        q = torch.clamp(torch.floor(x / self.delta) + up + self.zero_point, 0, self.n_levels - 1)
        return (q - self.zero_point) * self.delta


class ActLSQ(nn.Module):
    """A step that is initialised at the first call and learned."""

    def __init__(self, nbits=4, signed=True):
        super().__init__()
        self.nbits, self.signed = nbits, signed
        self.alpha = nn.Parameter(torch.zeros(1))
        self.register_buffer("init_state", torch.zeros(1, dtype=torch.uint8))

    def forward(self, x):
        low, high = (-(2 ** (self.nbits - 1)), 2 ** (self.nbits - 1) - 1) if self.signed else (0, 2**self.nbits - 1)
        if self.training and self.init_state == 0:
            self.alpha.data.copy_(2 * x.detach().abs().mean() / math.sqrt(high))
            self.init_state.fill_(1)
        alpha = grad_scale(self.alpha, 1 / math.sqrt(x.numel() * high))
        return round_ste((x / alpha).clamp(low, high)) * alpha


class ObservingQuantizer(nn.Module):
    """Moves its scale at each call while it observes."""

    def __init__(self):
        super().__init__()
        self.quant_min, self.quant_max, self.zero_point = -8, 7, 0
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    def forward(self, x):
        if self.observer_enabled[0] == 1:
            self.scale.copy_(0.9 * self.scale + 0.1 * x.detach().abs().max() / 7)
        q = torch.clamp(round_ste(x / self.scale) + self.zero_point, self.quant_min, self.quant_max)
        return (q - self.zero_point) * self.scale


class LearnedFakeQuantizer(nn.Module):
    """As MQBench's: raises its scale and clamps its zero point in place, and calls torch's learnable ops."""

    def __init__(self, channels=None, symmetric=False, flip=True):
        super().__init__()
        self.quant_min, self.quant_max = (-8, 7) if symmetric else (0, 15)
        self.symmetric, self.flip, self.ch_axis = symmetric, flip, -1 if channels is None else 0
        self.scale = nn.Parameter(torch.linspace(0.2, 0.4, channels or 1))
        self.zero_point = nn.Parameter(torch.full_like(self.scale, 5.3))
        self.register_buffer("eps", torch.tensor([1e-4]))
        self.register_buffer("observer_enabled", torch.zeros(1, dtype=torch.uint8))
        self.activation_post_process = nn.Identity()

    def forward(self, x):
        if self.observer_enabled[0] == 1:
            self.activation_post_process(x.detach())
        else:
            if self.flip:
                self.scale.data.abs_()
            self.scale.data.clamp_(min=self.eps.item())
        if self.symmetric:
            self.zero_point.data.zero_()
        else:
            self.zero_point.data.clamp_(self.quant_min, self.quant_max)
        factor = (x.numel() / self.scale.numel() * self.quant_max) ** -0.5
        if self.ch_axis == -1:
            return torch._fake_quantize_learnable_per_tensor_affine(
                x, self.scale, self.zero_point, self.quant_min, self.quant_max, factor
            )
        return torch._fake_quantize_learnable_per_channel_affine(
            x, self.scale, self.zero_point, self.ch_axis, self.quant_min, self.quant_max, factor
        )


class QuantizerThatDoublesItsScale(LearnedFakeQuantizer):
    def forward(self, x):
        if self.scale.max() < 1e-3:
            self.scale.data.mul_(2)
        return super().forward(x)


class QuantizerOfFloors(UniformAffineQuantizer):
    """A fork that rounds down."""

    def forward(self, x):
        if not self.inited:
            super().forward(x)
        q = torch.clamp((x / self.delta).floor() + self.zero_point, 0, self.n_levels - 1)
        return (q - self.zero_point) * self.delta


class QuantLayer(nn.Module):
    """A layer that holds quantizers, and is none."""

    def __init__(self, layer, bits=4):
        super().__init__()
        self.layer = layer
        self.weight_quantizer, self.act_quantizer = UniformAffineQuantizer(bits, True), UniformAffineQuantizer(bits)

    def forward(self, x):
        return nn.functional.linear(self.act_quantizer(x), self.weight_quantizer(self.layer.weight), self.layer.bias)
