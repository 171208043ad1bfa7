"""The weights of a block: quantized, and measured against their source, forward and backward.

The tensor is cut into four layers, as a block has them. Beside the eager formula stand hdrq's own ops, one after the
other for each layer.
"""

from __future__ import annotations

from functools import partial

import torch

import hdrq
from hdrq.benchmarks.bench_noise import official
from hdrq.benchmarks.harness import Bench, Provider, copies, normal, same_as_reference

QMIN, QMAX = -8, 7
LAYERS = 4


def together(weights: list, scales: list, sources: list, rngs: list | None) -> tuple:
    return hdrq.ops.quantize_weights(weights, scales, [(QMIN, QMAX)] * LAYERS, sources=sources, rngs=rngs)


def apart(weights: list, scales: list, sources: list, rngs: list | None) -> tuple:
    """Two ops for each layer."""
    ys, distances = [], []
    for k, (w, s, w_src) in enumerate(zip(weights, scales, sources, strict=True)):
        factor = 1 / (w.numel() * QMAX) ** 0.5
        if rngs is None:
            ys.append(hdrq.ops.fake_quantize(w, s, QMIN, QMAX, grad_scale=factor))
        else:
            ys.append(hdrq.ops.noise_quantize(w, s, QMIN, QMAX, rngs[k], grad_scale=factor))
        distances.append(hdrq.ops.source_distance(w, w_src))
    return ys, torch.stack(distances)


def eager(weights: list, scales: list, sources: list, rngs: list | None) -> tuple:
    """What the released code does for each layer: its quantizer, uniform or rounding, and a norm."""
    ys = [
        official(w, s, empirical=False) if rngs else (w / s).round().clamp(QMIN, QMAX) * s
        for w, s in zip(weights, scales, strict=True)
    ]
    return ys, torch.stack([(w - w_src).norm() for w, w_src in zip(weights, sources, strict=True)])


def verify(x: torch.Tensor, source: torch.Tensor, rng: torch.Tensor) -> None:
    few = x.flatten()[: 2**12], source.flatten()[: 2**12]
    for rngs in (None, [rng] * LAYERS):
        same_as_reference("a weight", lambda: torch.cat(together(*_layers(*few), rngs)[0]))  # noqa: B023


def _layers(x: torch.Tensor, source: torch.Tensor) -> tuple[list, list, list]:
    parts = [part.clone() for part in x.flatten().tensor_split(LAYERS)]
    scales = [torch.full((1,), 0.3, device=x.device) for _ in parts]
    return parts, scales, [part.clone() for part in source.flatten().tensor_split(LAYERS)]


def forward(noise: bool, x: torch.Tensor, source: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    arguments = (*_layers(x, source), [rng] * LAYERS if noise else None)
    functions = {"hdrq": together, "two ops of hdrq a layer": apart, "official formula, eager": eager}
    moved = 3 * x.element_size()
    return [*copies(x), *(Provider(name, partial(f, *arguments), moved) for name, f in functions.items())]


def step(noise: bool, x: torch.Tensor, source: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    """Forward and backward, with the gradient of what the block does with the weights given."""
    weights, scales, sources = _layers(x, source)
    for t in (*weights, *scales):
        t.requires_grad_()
    grads = [torch.randn_like(w) for w in weights]
    rngs = [rng] * LAYERS if noise else None

    def run(function) -> None:
        for t in (*weights, *scales):
            t.grad = None
        ys, distances = function(weights, scales, sources, rngs)
        torch.autograd.backward([*ys, distances.sum()], [*grads, None])

    moved = 7 * x.element_size()
    return [
        *copies(x),
        Provider("hdrq", partial(run, together), moved),
        Provider("two ops of hdrq a layer", partial(run, apart), moved),
    ]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return normal(shape, device, dtype), normal(shape, device, dtype, seed=1), hdrq.rng_state(1, device=device)


BENCH = Bench(
    "quantize_weights",
    inputs,
    verify,
    {
        "with noise": partial(forward, True),
        "rounding": partial(forward, False),
        "with noise, forward and backward": partial(step, True),
        "rounding, forward and backward": partial(step, False),
    },
)
