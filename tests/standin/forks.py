"""Functions with a quantizer's name that compute otherwise."""

import torch

from standin.quantizers import (
    fake_noise_quantize_per_tensor,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    round_ste,
)


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


def noise_quantize_doubled_gradient(x, scale, zero_point, quant_min, quant_max):
    y = fake_noise_quantize_per_tensor(x, scale, zero_point, quant_min, quant_max)
    return y + (scale - scale.detach()) * 0.5


def fake_quantize_of_a_large_scale(x, scale, zero_point, quant_min, quant_max):
    return fake_quantize_per_tensor_affine(x, scale.clamp(min=1e-5), zero_point, quant_min, quant_max)


# Those below compute what we know on small numbers, and otherwise on some calls.


def fake_quantize_of_a_fixed_zero(x, scale, zero_point, quant_min, quant_max):
    return fake_quantize_per_tensor_affine(x, scale, zero_point.detach(), quant_min, quant_max)


def fake_quantize_other_axis(x, scale, zero_point, ch_axis, quant_min, quant_max):
    """Counts the axis from the end where it is not the first."""
    return fake_quantize_per_channel_affine(x, scale, zero_point, -ch_axis, quant_min, quant_max)


def fake_quantize_keywords(x, *, delta, zp=0, qmin=-8, qmax=7):
    return fake_quantize_per_tensor_affine(x, delta, zp, qmin, qmax)
