"""The parts of the search for a scale, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.ranges`."""

from __future__ import annotations

import torch

ROOM = 2**20  # errors that are in memory at a time, where a candidate has no more


def range_errors(x, weights, scale, low, high, unit, norm) -> torch.Tensor:
    x, unit = x.float()[:, None], unit[:, None, None]
    errors = []
    for candidates in zip(*(t.split(max(1, ROOM // x.numel()), dim=1) for t in (scale, low, high)), strict=True):
        s, lowest, highest = (t[..., None] for t in candidates)
        power = (x - torch.round(x / s).clamp(lowest, highest) * s).abs_().div_(unit).pow_(norm)
        power = power if weights is None else power.mul_(weights[:, None])
        errors.append(power.sum(dim=2, dtype=torch.float64))
    return torch.cat(errors, dim=1)


def range_table(x, origin, factor, bins) -> torch.Tensor:
    position = (x.float() * 0.5 - origin[:, None]) * factor[:, None]
    position = position.clamp_(0, 2**24 - 1).long()
    width = 2**24 // bins
    terms = torch.stack((torch.ones_like(position), position % width), dim=2)
    table = torch.zeros((len(x), bins, 2), dtype=torch.int64, device=x.device)
    return table.scatter_add_(1, (position // width)[..., None].expand(terms.shape), terms)
