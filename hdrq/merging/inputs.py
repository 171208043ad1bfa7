"""The models of one merge together, each tensor read from all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hdrq import checks
from hdrq.evaluate.averaging import weighted_mean
from hdrq.merging.alike import check_alike
from hdrq.merging.layers import LayerInputs
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import Source


class Inputs:
    """Two or more models that differ in nothing but their numbers, and the weight of each.

    Args:
        sources: the models.
        settings: whose weights are used.
        device: where tensors are put once they are read; None for where they are.

    Raises:
        TypeError, ValueError: "X must be …, got …"; what differs between the models.
    """

    def __init__(self, sources: Sequence[Source], settings: MergeSettings, device: str | None = None) -> None:
        checks.integer("the number of models", len(sources), 2, 64)
        if device is not None:
            checks.device(device)
        self.sources, self.device = sources, device
        self.weights = settings.weights_of(len(sources))
        check_alike(sources)
        self.specs = dict(sources[0].specs)
        self.layers = sorted(sources[0].manifest["weights"])  # names; a file has no other order

    def tensor(self, name: str) -> list[torch.Tensor]:
        """One tensor of every model."""
        values = (source.tensor(name) for source in self.sources)
        return [value if self.device is None else value.to(self.device) for value in values]

    def layer(self, name: str) -> LayerInputs:
        """The quantized weight of one layer, of every model."""
        facts = self.sources[0].manifest["weights"][name]
        codes, scales = (self.tensor(f"{name}.weight.{part}") for part in ("codes", "scale"))
        qmin, qmax = facts["range"]
        return LayerInputs(name, self.layers.index(name), codes, scales, qmin, qmax, facts["axis"], facts["shape"])

    def mean(self, name: str) -> torch.Tensor:
        """The weighted mean of a floating-point tensor, in its dtype; the first model's where it holds integers."""
        dtype, _ = self.specs[name]
        if not dtype.is_floating_point:
            return self.sources[0].tensor(name)
        return weighted_mean(self.weights, self.tensor(name)).to(dtype)
