"""The loss between models: on the line through two, and on the plane through three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hdrq import checks
from hdrq.evaluate.averaging import average


class Barrier(NamedTuple):
    """What :func:`error_barrier` returns."""

    value: float  # the greatest rise over the mean loss of both ends
    positions: torch.Tensor  # λ, float64 (points,)
    losses: torch.Tensor  # float64 (points,)


class Surface(NamedTuple):
    """What :func:`loss_surface` returns. Lengths are Euclidean distances between the models' weights."""

    x: torch.Tensor  # float64 (points,): along the second model less the first
    y: torch.Tensor  # float64 (points,): at a right angle to it, towards the third
    losses: torch.Tensor  # float64 (points of y, points of x)
    places: torch.Tensor  # float64 (3, 2): where the models lie


def error_barrier(
    first: nn.Module, second: nn.Module, loss: Callable[[nn.Module], float], *, points: int = 11
) -> Barrier:
    """How much the loss rises between two models, on the straight line between their weights.

    Equation: ``max_λ L(θ_λ) − ½·(L(θ_1) + L(θ_2))``, ``θ_λ = (1 − λ)·θ_1 + λ·θ_2``, over evenly spaced λ in [0, 1].
    Every floating-point parameter and buffer is on that line; what a quantized model has there it rounds anew, with a
    scale that is on the line too.

    Args:
        first, second: models of one architecture; left as they are.
        loss: of a model, on data of the caller's choice; ``lambda m: 100 - accuracy(m, images, labels)`` will do.
        points: how many λ, both ends among them, 2 at least.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Frankle et al., ICML 2020; HDRQ (Shin et al., ICML 2025), Eq. 2.
    """
    positions = torch.linspace(0, 1, checks.integer("points", points, 2, 2**16), dtype=torch.float64)
    losses = _losses([first, second], [(1 - p, p) for p in positions.tolist()], loss)
    return Barrier(float(losses.max() - (losses[0] + losses[-1]) / 2), positions, losses)


def loss_surface(
    models: Sequence[nn.Module], loss: Callable[[nn.Module], float], *, points: int = 11, margin: float = 0.25
) -> Surface:
    """The loss on the plane through the weights of three models.

    Equation: with ``u = θ_2 − θ_1`` and v, the part of ``θ_3 − θ_1`` at a right angle to u, the loss at
    ``θ_1 + x·u/‖u‖ + y·v/‖v‖`` on an even grid that reaches beyond the models by ``margin`` of their extent.

    Args:
        models: three of one architecture, not on one line; left as they are.
        loss, points: as for :func:`error_barrier`; ``points²`` models are measured.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Garipov et al., NeurIPS 2018; HDRQ (Shin et al., ICML 2025), Figure 2.
    """
    if len(models) != 3:
        raise ValueError(f"models must be three, got {len(models)}")
    checks.integer("points", points, 2, 2**12)
    checks.real("margin", margin, 0.0)
    u, w = (_difference(model, models[0]) for model in models[1:])
    width = float(u.norm())
    along = float(w @ u) / width if width > 0 else 0.0
    height = float((w - along * u / width).norm()) if width > 0 else 0.0
    if height <= 1e-9 * float(w.norm()):
        raise ValueError("models must span a plane, got three on one line")
    places = torch.tensor([(0.0, 0.0), (width, 0.0), (along, height)], dtype=torch.float64)
    low, high = places.amin(0), places.amax(0)
    room = margin * (high - low)
    x, y = (torch.linspace(a, b, points, dtype=torch.float64) for a, b in zip(low - room, high + room, strict=True))
    third = [(b / height, a) for b in y.tolist() for a in x.tolist()]
    second = [((a - share * along) / width, share) for share, a in third]
    losses = _losses(models, [(1 - p - q, p, q) for p, q in second], loss)
    return Surface(x, y, losses.view(points, points), places)


def _losses(models: Sequence[nn.Module], weights: Sequence[tuple[float, ...]], loss) -> torch.Tensor:
    found = [float(loss(average(models, w, extrapolate=True))) for w in weights]
    return torch.tensor(found, dtype=torch.float64)


def _difference(model: nn.Module, other: nn.Module) -> torch.Tensor:
    """The parameters of one model minus those of another: one float64 vector."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.cat([(a.detach().double() - b.detach().double()).flatten() for a, b in pairs])
