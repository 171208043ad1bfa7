"""Functions with a quantizer's name that compute otherwise."""

import torch

from standin.quantizers import fake_noise_quantize_per_tensor, round_ste


def fake_quantize_floor(x, scale, zero_point, quant_min, quant_max):
    q = torch.clamp((x / scale).floor() + zero_point, quant_min, quant_max)
    return (q - zero_point) * scale


def fake_quantize_gradient_doubled(x, scale, zero_point, quant_min, quant_max):
    y = (torch.clamp(round_ste(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale
    return y + (y - y.detach())


def fake_quantize_with_temperature(x, scale, zero_point, quant_min, quant_max, temperature):
    return x * temperature


def fake_quantize_on_cuda(x, scale, zero_point, quant_min, quant_max):
    return torch.zeros(1, device="cuda") + x


def noise_quantize_gaussian(x, scale, zero_point, quant_min, quant_max):
    low, high = quant_min * scale, quant_max * scale
    noisy = x + (torch.randn(x.shape) * 0.3).clamp(-0.5, 0.5) * scale
    return torch.where(x >= high, high, torch.where(x <= low, low, noisy))


def fake_quantize_in_place(x, scale, zero_point, quant_min, quant_max):
    scale.data.mul_(2).div_(2).add_(1e-3)
    return (torch.clamp(round_ste(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale


def noise_quantize_shifted(x, scale, zero_point, quant_min, quant_max):
    return fake_noise_quantize_per_tensor(x, scale, 0, quant_min - zero_point, quant_max - zero_point)


def noise_quantize_scale_detached(x, scale, zero_point, quant_min, quant_max):
    return fake_noise_quantize_per_tensor(x, scale.detach(), zero_point, quant_min, quant_max)


def noise_quantize_detached(x, scale, quant_min, quant_max):
    return (x.detach() + torch.rand(x.shape) * scale).clamp(quant_min, quant_max)


def noise_quantize_summed(x, scale, quant_min, quant_max):
    return (x + torch.rand(x.shape) * scale).sum()


def quantize_names(names):
    return sorted(names)
