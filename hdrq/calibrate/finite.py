"""Whether a model in full precision returns numbers: nothing can be quantized or learned from NaN and infinity."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hdrq import tree
from hdrq.calibrate.data import Call, spans
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.prepare.observe import observe


@torch.no_grad()
def check_finite(
    model: nn.Module,
    calls: Sequence[Call],
    units: Sequence[str],
    name: str = "calibration",
    ranks: Ranks = ALONE,
) -> None:
    """What units return first is finite on all calls, and the model returns no NaN.

    Infinities that the model returns, while its units do not, are a warning: no unit is learned from them, and masked
    logits are such. So are masks that a unit hands on beside what it computes.

    Args:
        units: :func:`hdrq.prepare.units.find_blocks`.
        name: what messages call the data.
        ranks: share the samples; each looks at its own.

    Raises:
        ValueError: a value is not; the message names the first module that returns one, and the samples.
    """
    infinite, own = False, ranks.share(calls)
    before = ranks.span(sum(call.size for call in calls))[0]
    for call, (start, stop) in zip(own, spans(own), strict=True):
        broken: list[str] = []

        def look(unit: str, module: nn.Module, args: tuple, kwargs: dict, output: Any, broken=broken) -> None:
            if not broken and not _finite(output):
                broken.append(unit)

        output = observe(model, call, after=look, names=units)
        if broken or any(x.isnan().any() for x in _floats(output)):
            raise ValueError(
                f"model must return finite values on {name}, got NaN or infinity among samples {before + start} to "
                f"{before + stop - 1}, first from {_origin(model, call)}; leave out those samples, mend its weights or "
                "what it reads, or call model.float() where half types overflow"
            )
        infinite |= any(x.isinf().any() for x in _floats(output))
    if infinite:
        warnings.warn(
            f"model returns infinity on {name}, behind its last unit: what is quantized does not read it", stacklevel=6
        )


def _finite(output: Any) -> bool:
    """Whether the first floating-point tensor in an output is finite."""
    return all(bool(x.isfinite().all()) for x in list(_floats(output))[:1])


def _floats(output: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree.leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point())


def _origin(model: nn.Module, call: Call) -> str:
    """The first module that returns a value that is not finite, in words."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not found and not _finite(output):
            kind = type(module).__name__
            own = [key for key, p in module.named_parameters(recurse=False) if not _finite(p)]
            inside = any(not _finite(x) for x in _floats((args, kwargs)))
            why = (
                f", whose {own[0]} is not finite"
                if own
                else ", which reads one that no module returned"
                if inside
                else ""
            )
            found.append(f"layer {name!r} ({kind}){why}" if name else f"the model's own forward ({kind})")

    observe(model, call, after=look)
    return found[0] if found else "the model's own forward"
