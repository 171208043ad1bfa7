"""All weights of a block, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.weights`."""

from __future__ import annotations

import torch

from hdrq.backends.eager.distance import source_distance
from hdrq.backends.eager.fakequant import fake_quantize, fake_quantize_backward
from hdrq.backends.eager.noise import noise_quantize, noise_quantize_backward
from hdrq.rng import KEEP_ALL


def quantize_weights(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes) -> tuple:
    results = []
    for k, w in enumerate(weights):
        grid = (w, scales[k], qmins[k], qmaxs[k])
        if rngs:
            cumulative = cumulatives[k] if cumulatives else None
            results.append(noise_quantize(*grid, rngs[k], cumulative, axes[k], KEEP_ALL))
        else:
            results.append(fake_quantize(*grid, None, axes[k], None, KEEP_ALL))
    distances = [source_distance(w, w_src) for w, w_src in zip(weights, sources, strict=False)]
    return results, torch.stack(distances) if sources else scales[0].new_zeros(len(weights))


def quantize_weights_backward(
    grads, grad_distances, distances, weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes, grad_scales
) -> tuple:
    grad_ws, grad_ss = [], []
    factors = torch.where(distances > 0, grad_distances / distances, 0.0)
    for k, w in enumerate(weights):
        grid = (grads[k], w, scales[k], qmins[k], qmaxs[k])
        if rngs:
            cumulative = cumulatives[k] if cumulatives else None
            args = (rngs[k], cumulative, axes[k], grad_scales[k], KEEP_ALL)
            grad_w, grad_s = noise_quantize_backward(*grid, *args)
        else:
            grad_w, grad_s, _ = fake_quantize_backward(*grid, None, axes[k], grad_scales[k], None, KEEP_ALL)
        if sources:
            grad_w = grad_w + (w.float() - sources[k].float()) * factors[k]
        grad_ws.append(grad_w)
        grad_ss.append(grad_s)
    return grad_ws, grad_ss
