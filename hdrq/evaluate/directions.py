"""The loss around one model, along random directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hdrq import checks
from hdrq.evaluate.landscape import Surface
from hdrq.evaluate.weights import Weight, weights_of
from hdrq.prepare.copying import copy_model
from hdrq.quantizers.layers import input_quantizers


@torch.no_grad()
def direction_surface(
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    *,
    move: str = "weights",
    directions: int = 2,
    points: int = 11,
    reach: float = 1.0,
    seed: int = 0,
) -> Surface:
    """The loss along one or two random directions from a model.

    Equation, at ``(x, y)`` on an even grid over [−reach, reach]², or ``y = 0`` for one direction::

        move="weights":  w_f + x·‖w_f‖·d_f/‖d_f‖ + y·‖w_f‖·e_f/‖e_f‖    w_f: what leads to one output channel
        move="scales":   s·exp(x·d + y·e)

    with d and e from N(0, 1) for each weight, or each scale. Biases and the weights of norms stay. Of a quantized model
    "weights" moves the latents, which are rounded anew with scales held; "scales" moves those of weights and of inputs,
    and rounds the latents anew, which are held.

    Args:
        model: left as it is.
        loss: of a model, on data of the caller's choice.
        move: ``"weights"``, or ``"scales"`` of a quantized model.
        directions: 1 or 2; ``points`` or ``points²`` models are measured.
        points: an odd number has the model itself in the middle.
        reach: in units of a filter's norm; of scales, in logarithms.
        seed: of the directions, the same on every device.

    Returns:
        A :class:`Surface`, whose ``places`` (1, 2) is the origin.

    Raises:
        TypeError, ValueError: "X must be …, got …"; scales of a model that has none.

    Source: Li et al., NeurIPS 2018 (filter normalization); HDRQ (Shin et al., ICML 2025), Figure 2.
    """
    checks.choice("move", move, ("weights", "scales"))
    checks.integer("directions", directions, 1, 2)
    checks.integer("points", points, 2, 2**12)
    checks.real("reach", reach, 0.0)
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, 0, 2**63 - 1))
    moved = copy_model("model", model)
    values, ways = (_filters if move == "weights" else _scales)(moved, generator)
    start = [value.double() for value in values]
    along = torch.linspace(-reach, reach, points, dtype=torch.float64)
    across = along if directions == 2 else torch.zeros(1, dtype=torch.float64)
    losses = torch.empty(len(across), points, dtype=torch.float64)
    for i, y in enumerate(across.tolist()):
        for j, x in enumerate(along.tolist()):
            for value, still, (d, e) in zip(values, start, ways, strict=True):
                shift = x * d + y * e
                value.copy_(still * shift.exp() if move == "scales" else still + shift)
            losses[i, j] = float(loss(moved))
    return Surface(along, across, losses, torch.zeros(1, 2, dtype=torch.float64))


def _filters(model: nn.Module, generator: torch.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights, and for each two directions whose filters have its filters' norms: (2, …), float64."""
    weights = weights_of(model).values()
    return [weight.value for weight in weights], [_normalized(weight, generator) for weight in weights]


def _normalized(weight: Weight, generator: torch.Generator) -> torch.Tensor:
    rows = weight.value.double().transpose(0, weight.axis)
    d = torch.randn((2, *rows.shape), dtype=torch.float64, generator=generator).to(rows.device)
    inside = tuple(range(1, rows.ndim))
    norms = torch.linalg.vector_norm(rows, dim=inside, keepdim=True)
    lengths = torch.linalg.vector_norm(d, dim=tuple(k + 1 for k in inside), keepdim=True)
    return (d * norms / lengths).transpose(1, weight.axis + 1)


def _scales(model: nn.Module, generator: torch.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The scales of weights and inputs, and for each two directions: (2, …), float64."""
    quantizers = [weight.quantizer for weight in weights_of(model).values()] + [*input_quantizers(model).values()]
    scales = [quantizer.scale for quantizer in quantizers if quantizer is not None]
    if not scales:
        raise ValueError('model must be quantized for move="scales", got one in full precision')
    draw = [torch.randn((2, *scale.shape), dtype=torch.float64, generator=generator) for scale in scales]
    return [*scales], [d.to(scale.device) for d, scale in zip(draw, scales, strict=True)]
