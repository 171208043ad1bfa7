"""Whether a model gives the same output for the same input, which every comparison of outputs needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hdrq.checks import listed
from hdrq.prepare.folding import allowed_change, relative_change
from hdrq.prepare.precision import full_precision

STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
DROPOUT = nn.modules.dropout._DropoutNd


@full_precision()
@torch.no_grad()
def check_repeatable(name: str, model: nn.Module, run: Callable) -> None:
    """Two runs of ``run(model)`` give the same outputs, but for the order of sums.

    Raises:
        ValueError: they do not; the message says whether random numbers make the difference.
    """
    first = run(model)
    change = relative_change(first, run(model))
    if change <= allowed_change(first, 1e-5):
        return
    seeded = []
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for _ in range(2):
        with torch.random.fork_rng(list(devices)):
            torch.manual_seed(0)
            seeded.append(run(model))
    why = "it draws random numbers"
    if not relative_change(*seeded) <= allowed_change(first, 1e-5):
        why = "it keeps state from one call to the next, or draws random numbers that torch does not seed"
    training = list(trained(model))
    if training:
        why += f"; in training mode: {listed(map(repr, training))}"
    raise ValueError(
        f"{name} must give the same output for the same input, got a relative difference of {change:.2g} between two "
        f"runs: {why}"
    )


def trained(model: nn.Module) -> dict[str, bool]:
    """The modules inside a model that are in training mode, and whether what they compute is known to depend on it."""
    found = {}
    for name, module in model.named_modules():
        if name and module.training:
            statistics = isinstance(module, STATISTICS) and module.track_running_stats
            found[name] = statistics or (isinstance(module, DROPOUT) and module.p > 0)
    return found
