"""Functions as QDrop, the released HDRQ and LSQ have them."""

import torch


def round_ste(x):
    return (x.round() - x).detach() + x


def grad_scale(t, factor):
    return (t - t * factor).detach() + t * factor


def fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max):
    q = torch.clamp(round_ste(x / scale) + zero_point, quant_min, quant_max)
    return (q - zero_point) * scale


def fake_quantize_per_channel_affine(x, scale, zero_point, ch_axis, quant_min, quant_max):
    shape = [1] * x.ndim
    shape[ch_axis] = x.shape[ch_axis]
    return fake_quantize_per_tensor_affine(x, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)


def fake_quantize_ignoring_zero(x, scale, zero_point, quant_min, quant_max):
    """As the released HDRQ has it: the zero point is an argument and nothing more."""
    return torch.clamp(round_ste(x / scale), quant_min, quant_max) * scale


def fake_quantize_learnable_per_tensor_affine_training(x, scale, zero_point, quant_min, quant_max, grad_factor):
    return fake_quantize_per_tensor_affine(x, grad_scale(scale, grad_factor), zero_point, quant_min, quant_max)


def fake_quantize_learnableplus_per_channel_affine_training(
    x, scale, zero_point, ch_axis, quant_min, quant_max, grad_factor
):
    zero_point = grad_scale(round_ste(zero_point), grad_factor)
    return fake_quantize_per_channel_affine(
        x, grad_scale(scale, grad_factor), zero_point, ch_axis, quant_min, quant_max
    )


def fake_noise_quantize_per_tensor(x, scale, zero_point, quant_min, quant_max):
    """Noise from a histogram of the rounding errors inside, clipped by masks; the straight-through gradient."""
    low, high = quant_min * scale, quant_max * scale
    inside = (x > low) & (x < high)
    v = (x / scale).detach()
    counts = torch.histc((v.round() - v)[inside], 256, -0.5, 0.5)
    bins = torch.multinomial(counts / counts.sum(), x.numel(), replacement=True).reshape(x.shape)
    noise = (bins + torch.rand(x.shape)) / 256 - 0.5
    return torch.where(x >= high, high, torch.where(x <= low, low, x + noise * scale))


class FunLSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, alpha, g, Qn, Qp):
        ctx.save_for_backward(weight, alpha)
        ctx.other = g, Qn, Qp
        return (weight / alpha).clamp(Qn, Qp).round() * alpha

    @staticmethod
    def backward(ctx, grad):
        weight, alpha = ctx.saved_tensors
        g, low, high = ctx.other
        v = weight / alpha
        below, above = (v < low).float(), (v > high).float()
        inside = 1 - below - above
        slope = below * low + above * high + inside * (v.round() - v)
        return inside * grad, (slope * grad * g).sum().reshape(alpha.shape), None, None, None
