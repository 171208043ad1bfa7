"""Family ``weights`` in C++ (csrc/quantizer.h)."""

from __future__ import annotations

import torch

from hdrq.backends.native import backward, forward, quantizer
from hdrq.rng import KEEP_ALL


def quantize_weights(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes) -> tuple:
    quantizers = _quantizers(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes)
    results, squares = forward(quantizers, weights)
    return results, torch.tensor(squares, dtype=torch.float64).sqrt().float()


def quantize_weights_backward(
    grads, grad_distances, distances, weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes, grad_scales
) -> tuple:
    quantizers = _quantizers(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes)
    factors = torch.where(distances > 0, grad_distances / distances, 0.0)
    return backward(quantizers, grads, scales, grad_scales, factors.tolist())


def _quantizers(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes) -> list:
    def of(tensors, k):
        return tensors[k] if tensors else None

    return [
        quantizer(
            w,
            scales[k],
            None,
            qmins[k],
            qmaxs[k],
            axes[k],
            of(rngs, k),
            KEEP_ALL,
            noise=bool(rngs),
            cumulative=of(cumulatives, k),
            source=of(sources, k),
        )
        for k, w in enumerate(weights)
    ]
