"""What a merged model is worth: accuracies, their harmonic mean, and the loss between models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hdrq import checks
from hdrq.calibration import Call
from hdrq.model import hooks, input_quantizers
from hdrq.quantizers import mean_range


def harmonic_mean(values: Iterable[float]) -> float:
    """``n / Σ 1/v``; 0 where a value is 0.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    values = [float(v) for v in values]
    if not values or not all(0 <= v < math.inf for v in values):
        raise ValueError(f"values must be one or more finite numbers that are not negative, got {values}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / v for v in values)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """The share of images whose greatest logit is the label's, in percent. ``images`` (N, …), ``labels`` (N,) int64.

    Raises:
        ValueError: no images, or not as many labels.
    """
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be one for each image, got {tuple(labels.shape)} for {len(images)} images")
    checks.integer("batch_size", batch_size, 1, 2**31)
    return accuracy_of(model, zip(images.split(batch_size), labels.split(batch_size), strict=True))


@torch.no_grad()
def accuracy_of(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """:func:`accuracy` over batches of images and labels, moved to where the model is.

    The logits are the first floating-point tensor that the model returns.
    """
    parameter = next(model.parameters(), None)
    right = total = 0
    for x, y in batches:
        if parameter is not None:
            x, y = x.to(parameter.device), y.to(parameter.device)
        right += int((_first(model(x)).argmax(dim=1) == y).sum())
        total += len(y)
    return 100 * right / total


@torch.no_grad()
def average(
    models: Sequence[nn.Module], weights: Sequence[float] | None = None, *, extrapolate: bool = False
) -> nn.Module:
    """The plain weighted average of models, parameters and buffers: what a merge aims at, in full precision.

    Raises:
        TypeError, ValueError: "X must be …, got …"; weights that are negative, but to ``extrapolate``.
    """
    models = list(models)
    checks.integer("the number of models", len(models), 1, 64)
    lam = checks.mixing_weights(weights, len(models), extrapolate)
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    for k, other in enumerate(shapes):
        if other != shapes[0]:
            wrong = sorted(name for name, _ in other.items() ^ shapes[0].items())
            raise ValueError(f"models must have one architecture, got number {k} different in {', '.join(wrong[:10])}")
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            value.copy_(weighted_mean(lam, [state[name] for state in states]))
    own = [list(input_quantizers(model).values()) for model in models]
    for target, *quantizers in zip(input_quantizers(merged).values(), *own, strict=True):
        scales, ranges = zip(*((float(q.scale), (q.qmin, q.qmax)) for q in quantizers), strict=True)
        target.qmin, target.qmax = mean_range(lam, scales, ranges)
    return merged


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


def weighted_mean(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """``Σ λ_k·x_k`` in float64; an x of weight 0 may be anything, infinity too."""
    terms = (w * value.double() for w, value in zip(weights, values, strict=True) if w)
    return sum(terms, torch.zeros_like(values[0], dtype=torch.float64))


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
    """Of the parameters of two models, float64, as one vector."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.cat([(a.detach().double() - b.detach().double()).flatten() for a, b in pairs])


@torch.no_grad()
def accumulated_errors(
    model: nn.Module, full: nn.Module, batches: Sequence[Call], blocks: Sequence[str]
) -> dict[str, float]:
    """How far a quantized model is from full precision: ``‖y_q − y‖² / ‖y‖²`` of each block's output and the model's.

    Nothing is reset between blocks, so the error of a block contains that of all before it. Sums run over all
    samples of ``batches``, in float64, of the first tensor that a block returns at its first call.
    """
    names = (*blocks, "output")
    wrong, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for call in batches:
        ours, theirs = (_outputs(m, call, blocks) for m in (model, full))
        for name in names:
            y = theirs[name].double()
            wrong[name] += float((ours[name].double() - y).square().sum())
            size[name] += float(y.square().sum())
    return {name: wrong[name] / max(size[name], 1e-300) for name in names}


def _outputs(model: nn.Module, call: Call, blocks: Sequence[str]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def look(module, args, output) -> None:
            if name not in seen:
                seen[name] = _first(output).clone()  # what follows may work in place

        return look

    with hooks(model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks):
        seen["output"] = _first(call(model))
    return seen


def _first(tree) -> torch.Tensor:
    return next(x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point())
