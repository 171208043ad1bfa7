"""The block-wise loop once more, in plain PyTorch and from the equations: it imports nothing of hdrq.

Every tensor that is learned, every draw and every rate is spelled out, so that a mistake in the loop cannot hide.
Draws are given as ``draw(stream, step, shape)``, the contract's 32-bit words. Streams are counted from 0: one for each
weight, then for each quantizer of activations, then for each input of the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DROP = 0x80000000


@dataclass
class Rates:
    """What a recipe says, in the oracle's own words."""

    steps: int
    learns: str = "weights"  # or "rounding"
    fake_quant_steps: int = 0  # at the end; the others have noise in place of rounding
    empirical: bool = False
    noisy_activations: bool = False
    weight_rate: float = 1e-3
    warm_steps: int = 0
    cosine: bool = True
    activation_rate: float = 4e-5
    weight_step: float = 0.1
    scale_step: float = 0.01
    distance: float = 0.0
    input_keep: float = 0.5
    activation_keep: float = 0.5


def scaled_gradient(s, factor):
    return s * factor + (s - s * factor).detach()


def keeps(draw, stream, step, shape, p):
    pairs = draw(stream ^ DROP, step, torch.Size([(shape.numel() + 1) // 2]))
    coins = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1).flatten()[: shape.numel()]
    return coins.view(shape) < round(p * 2**16)


def noise(x, s, low, high, words, empirical):
    """One number in [−½, ½) per element: uniform, or distributed as the rounding errors of what is not clipped."""
    if not empirical:
        return (words >> 8).float() / 2**24 - 0.5
    inside = (x > low * s) & (x < high * s)
    errors = ((x / s).round() - x / s)[inside]
    counts = torch.bincount(((errors + 0.5) * 256).floor().clamp(0, 255).long(), minlength=256)
    ends = counts.cumsum(0)
    bins = torch.searchsorted(ends, (words * counts.sum()) >> 32, right=True).clamp(max=255)
    return ((bins << 16) | (words & 0xFFFF)).float() / 2**24 - 0.5


def noise_quantized(x, s, low, high, n):
    y = torch.where(x >= high * s, high * s, x + n * s)
    return torch.where(x <= low * s, low * s, y)


def clamped(x, low, high):
    """Passes gradients on its bounds, as torch's clamp does before 2.14 alone."""
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


def fake_quantized(x, s, low, high):
    v = x / s
    return clamped(v + (v.round() - v).detach(), low, high) * s


def soft_rounding(alpha):
    return clamped(1.2 * alpha.sigmoid() - 0.1, 0.0, 1.0)


def loop(block, weights, scales, inputs, rates: Rates, batches, draw):
    """``rates.steps`` steps of learning a block.

    Args:
        block: ``block(weights, act, *x)`` computes it, ``act(k, x)`` quantizes what its k-th quantizer reads.
        weights: of each layer ``(w, scale, low, high, source)``; scales: of each quantizer ``(scale, low, high)``.
        inputs: of each input its rows behind the quantized prefix and in full precision; then the target's rows.
        batches: for each step, the rows.

    Returns:
        Of the learned weights (or α), of their scales and of the scales of activations: each with its last value, and
        with Adam's mean of its gradients, which no rate hides.
    """
    (*pairs, target), rounding = inputs, rates.learns == "rounding"
    latents = [w.clone() for w, *_ in weights]
    steps = [s.clone() for _, s, *_ in weights]
    sizes = [s.clone() for s, *_ in scales]
    if rounding:
        rests = [(w / s - (w / s).floor()).clamp(2**-10, 1 - 2**-10) for w, s, *_ in weights]
        towards_even = [((w / s).round() - w / s).sign() / 2**10 for w, s, *_ in weights]
        rests = [torch.where(rest == 0.5, 0.5 + even, rest) for rest, even in zip(rests, towards_even, strict=True)]
        alphas = [-(1.2 / (rest + 0.1) - 1).log() for rest in rests]
    learned = alphas if rounding else [*latents, *steps]
    for p in (*learned, *sizes):
        p.requires_grad_(True)
    groups = [{"params": learned, "lr": rates.weight_rate}, {"params": sizes, "lr": rates.activation_rate}]
    adam = torch.optim.Adam(groups)
    bounds = [(s, rates.scale_step * s.detach().clone(), 1) for s in sizes]
    if not rounding:
        bounds += [(s, rates.scale_step * s.detach().clone(), 0) for s in steps]
        bounds += [(w, rates.weight_step * s.detach().clone(), 0) for w, s in zip(latents, steps, strict=True)]

    for i in range(rates.steps):
        noisy = i < rates.steps - rates.fake_quant_steps and not rounding

        def act(k, x, noisy=noisy, i=i):
            _, low, high = scales[k]
            stream = len(weights) + k
            s = scaled_gradient(sizes[k], 1 / math.sqrt(x.numel() * high))
            if noisy and rates.noisy_activations:
                n = noise(x.detach(), s.detach(), low, high, draw(stream, i, x.shape), rates.empirical)
                y = noise_quantized(x, s, low, high, n)
            else:
                y = fake_quantized(x, s, low, high)
            return torch.where(keeps(draw, stream, i, x.shape, rates.activation_keep), y, x)

        quantized, extra = [], torch.zeros(())
        for k, (w, _, low, high, source) in enumerate(weights):
            if rounding:
                h = soft_rounding(alphas[k])
                quantized.append(clamped((w / steps[k]).floor() + h, low, high) * steps[k])
                warm = 0.2 * rates.steps
                beta = 20 - 18 * max(i - warm, 0) / (rates.steps - warm)
                extra = extra + (i >= warm) * 0.01 * (1 - (2 * h - 1).abs() ** beta).sum()
                continue
            s = scaled_gradient(steps[k], 1 / math.sqrt(w.numel() * high))
            if noisy:
                n = noise(latents[k].detach(), s.detach(), low, high, draw(k, i, w.shape), rates.empirical)
                quantized.append(noise_quantized(latents[k], s, low, high, n))
            else:
                quantized.append(fake_quantized(latents[k], s, low, high))
            if source is not None:
                extra = extra + rates.distance * (latents[k] - source).norm()
        mixed = []
        for k, (behind, full) in enumerate(pairs):
            a, b = behind[batches[i]], full[batches[i]]
            keep = keeps(draw, len(weights) + len(scales) + k, i, a.shape, rates.input_keep)
            mixed.append(torch.where(keep, a, b))
        output = block(quantized, act, *mixed)
        loss = ((output - target[batches[i]]) ** 2).sum(1).mean() + extra

        adam.zero_grad()
        loss.backward()
        share = i / rates.steps
        warm = rates.warm_steps / rates.steps
        rise = 1e-3 + (1 - 1e-3) * share / warm if share < warm else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * (share - warm) / (1 - warm))) if rates.cosine and share >= warm else 1.0
        adam.param_groups[0]["lr"] = rates.weight_rate * rise * fall
        adam.param_groups[1]["lr"] = rates.activation_rate * 0.5 * (1 + math.cos(math.pi * share))
        before = [p.detach().clone() for p, *_ in bounds]
        adam.step()
        with torch.no_grad():  # a step is cut to that share of itself at which the full rate is the bound
            for (p, bound, group), old in zip(bounds, before, strict=True):
                rate = (rates.weight_rate, rates.activation_rate)[group]
                p.copy_(old + (p - old) * (bound / rate).clamp(max=1))
    return [(p.detach(), adam.state[p]["exp_avg"]) for p in (*learned, *sizes)]
