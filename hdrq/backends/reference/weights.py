"""All weights of a block, quantized and measured against their sources: the definition is the composition."""

from __future__ import annotations

import numpy as np

from hdrq.backends.reference.distance import source_distance
from hdrq.backends.reference.fakequant import fake_quantize, fake_quantize_backward
from hdrq.backends.reference.noise import noise_quantize, noise_quantize_backward


def quantize_weights(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes) -> tuple:
    """``Ŵ = noise_quantize(W)`` where there are rngs, else ``fake_quantize(W)``; ``d = ‖W − W_src‖₂``, or 0."""
    results = []
    for k, w in enumerate(weights):
        grid = (w, scales[k], qmins[k], qmaxs[k])
        if rngs:
            results.append(noise_quantize(*grid, rngs[k], cumulatives[k] if cumulatives else None, axes[k]))
        else:
            results.append(fake_quantize(*grid, None, axes[k]))
    distances = [source_distance(w, w_src) for w, w_src in zip(weights, sources, strict=False)]
    return results, np.array(distances or [0] * len(weights), dtype=np.float32)


def quantize_weights_backward(
    grads, grad_distances, distances, weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes, grad_scales
) -> tuple:
    """``∂W`` is the quantizer's plus ``(W − W_src)·(∂d/d)``, the factor rounded first, 0 where d is 0."""
    grad_ws, grad_ss = [], []
    for k, w in enumerate(weights):
        grid = (grads[k], w, scales[k], qmins[k], qmaxs[k])
        if rngs:
            cumulative = cumulatives[k] if cumulatives else None
            grad_w, grad_s = noise_quantize_backward(*grid, rngs[k], cumulative, axes[k], grad_scales[k])
        else:
            grad_w, grad_s, _ = fake_quantize_backward(*grid, None, axes[k], grad_scales[k])
        if sources:
            factor = grad_distances[k] / distances[k] if distances[k] > 0 else np.float32(0)
            grad_w = grad_w + (w - sources[k]) * factor
        grad_ws.append(grad_w)
        grad_ss.append(grad_s)
    return grad_ws, grad_ss
