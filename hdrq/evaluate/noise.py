"""The error barrier between models whose weights carry the noise of quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.evaluate.averaging import average
from hdrq.evaluate.weights import Weight, let_through, weights_of
from hdrq.rng import rng_state


class NoisyBarrier(NamedTuple):
    """What :func:`noisy_error_barrier` returns."""

    value: float  # mean over draws of the greatest rise over the mean loss of both ends
    standard_error: float  # of that mean; NaN for one draw
    positions: torch.Tensor  # λ, float64 (points,)
    losses: torch.Tensor  # float64 (draws, points)


@torch.no_grad()
def noisy_error_barrier(
    first: nn.Module,
    second: nn.Module,
    loss: Callable[[nn.Module], float],
    *,
    points: int = 11,
    draws: int = 8,
    seed: int = 0,
    steps: Sequence[nn.Module] | None = None,
) -> NoisyBarrier:
    """How much the loss rises between two models whose weights carry uniform noise in place of rounding.

    Equation, for each draw::

        max_λ L(θ_λ + ε_λ) − ½·(L(θ_1 + ε_1) + L(θ_2 + ε_2)),   θ_λ = (1 − λ)·θ_1 + λ·θ_2
        ε_λ = n·s_λ,  n ~ U[−½, ½),  s_λ = (1 − λ)·s_1 + λ·s_2

    over evenly spaced λ in [0, 1]; s_k are the steps of the k-th model's weights. The source does not say what ε_λ is:
    here it has the step that a merge has, and one n for each weight serves every λ of a draw, so that the maximum is
    not that of independent noise, and ε is ε_1 and ε_2 at the ends. Weights carry the noise unrounded and unclamped;
    biases have none; quantizers of activations stay, with scales on the line.

    Args:
        first, second: models of one architecture; left as they are.
        loss: of a model, on data of the caller's choice.
        points: how many λ, both ends among them, 2 at least.
        draws: of the noise; ``points·draws`` models are measured.
        seed: of the noise, the same on every device.
        steps: two quantized models whose scales are the steps; those that are measured, if they are quantized.

    Raises:
        TypeError, ValueError: "X must be …, got …"; models in full precision without ``steps``.

    Source: HDRQ (Shin et al., ICML 2025), Eq. 3.
    """
    positions = torch.linspace(0, 1, checks.integer("points", points, 2, 2**16), dtype=torch.float64)
    checks.integer("draws", draws, 1, 2**31)
    if steps is not None and len(steps) != 2:
        raise ValueError(f"steps must be two models, got {len(steps)}")
    own = [_steps(model) for model in ((first, second) if steps is None else steps)]
    losses = torch.empty(draws, points, dtype=torch.float64)
    for column, p in enumerate(positions.tolist()):
        mean = average([first, second], (1 - p, p))
        let_through(mean)
        weights = weights_of(mean)
        _check_layers(weights, own)
        moved = [
            (weights[name].value, weights[name].value.clone(), *(each[name].step for each in own)) for name in own[0]
        ]
        for draw in range(draws):
            for stream, (value, still, s1, s2) in enumerate(moved):
                step = ((1 - p) * s1 + p * s2).to(value.device)
                value.copy_(still + step * _uniform(value, seed, stream, draw))
            losses[draw, column] = float(loss(mean))
    values = losses.amax(1) - (losses[:, 0] + losses[:, -1]) / 2
    error = float(values.std() / draws**0.5) if draws > 1 else float("nan")
    return NoisyBarrier(float(values.mean()), error, positions, losses)


def _uniform(like: torch.Tensor, seed: int, stream: int, draw: int) -> torch.Tensor:
    """Numbers from U[−½, ½) in the shape of a tensor, float32."""
    zeros, one = (make((), device=like.device) for make in (torch.zeros, torch.ones))
    rng = rng_state(seed, stream, draw, like.device)
    return ops.noise_quantize(zeros.expand(like.shape), one, -1, 1, rng)


def _steps(model: nn.Module) -> dict[str, Weight]:
    """The weights of a model that have steps."""
    found = {name: weight for name, weight in weights_of(model).items() if weight.quantizer is not None}
    if not found:
        raise ValueError("steps must be two quantized models where those measured are not, got one in full precision")
    return found


def _check_layers(weights: dict[str, Weight], steps: Sequence[dict[str, Weight]]) -> None:
    """Both models whose steps are taken quantize the same layers, all of which are measured."""
    shapes = [{name: tuple(weight.value.shape) for name, weight in each.items()} for each in (*steps, weights)]
    wrong = shapes[0].items() ^ shapes[1].items() or shapes[0].items() - shapes[2].items()
    if wrong:
        names = checks.listed(sorted({name for name, _ in wrong}))
        raise ValueError(f"steps must be of models with the quantized layers of those measured, got others in {names}")
