"""The models of one merge together, each tensor read from all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hdrq import checks
from hdrq.checkpoint.format import codes_spec
from hdrq.checks import listed
from hdrq.evaluate.averaging import weighted_mean
from hdrq.merging.alike import check_alike, warn_of_moved_scales
from hdrq.merging.layers import LayerInputs
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import Source, label_of
from hdrq.quantizers.bits import BitWidths


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
        check_alike(sources, settings.bits)
        tied = {f"{name}.weight": f"{owner}.weight" for name, owner in sources[0].manifest["tied"].items()}
        names = dict.fromkeys([*sources[0].specs, *tied, *tied.values()])
        self.weights = settings.weights_of(len(sources), names)  # by tensor
        if apart := [name for name, owner in tied.items() if self.weights[name] != self.weights[owner]]:
            raise ValueError(
                f"weights must be the same for layers that share a weight, got others for {listed(apart)} than for "
                f"{listed(tied[name] for name in apart)}"
            )
        warn_of_moved_scales(sources)
        self.labels = [label_of(source, k) for k, source in enumerate(sources)]
        self.ranges = merged_weight_ranges(sources, settings.bits)
        self.levels = merged_input_levels(sources, settings.bits)
        self.specs = dict(sources[0].specs)
        for name, (qmin, qmax) in self.ranges.items():
            shape = tuple(sources[0].manifest["weights"][name]["shape"])
            self.specs[f"{name}.weight.codes"] = codes_spec(qmin, qmax, shape)
        self.layers = sorted(self.ranges)  # names; a file has no other order

    def tensor(self, name: str) -> list[torch.Tensor]:
        """One tensor of every model.

        Raises:
            ValueError: it holds a number that is not finite; see :func:`check_finite`.
        """
        values = [source.tensor(name) for source in self.sources]
        check_finite(name, values, self.labels, self.weights[name])
        return [value if self.device is None else value.to(self.device) for value in values]

    def layer(self, name: str) -> LayerInputs:
        """The quantized weight of one layer, of every model. Groups are rows there, each with its own scale."""
        facts = self.sources[0].manifest["weights"][name]
        codes, scales = (self.tensor(f"{name}.weight.{part}") for part in ("codes", "scale"))
        for scale, label in zip(scales, self.labels, strict=True):
            checks.scale_values(f"{name}.weight.scale in {label}", scale)
        zeros = [z.float() for z in self.tensor(f"{name}.weight.zero_point")] if facts.get("affine") else None
        ranges = [tuple(source.manifest["weights"][name]["range"]) for source in self.sources]
        axis, shape = facts["axis"], facts["shape"]
        if facts.get("group_size") is not None:
            axis, shape = 0, (scales[0].numel(), facts["group_size"])
            codes = [c if c.dtype == torch.uint8 else c.view(shape) for c in codes]
        grid = (codes, scales, zeros, ranges, *self.ranges[name], axis)
        weights = self.weights[f"{name}.weight.codes"]
        return LayerInputs(name, self.layers.index(name), *grid, shape, weights)

    def mean(self, name: str) -> torch.Tensor:
        """The weighted mean of a floating-point tensor, in its dtype; the first model's where it holds integers.

        Where all models hold −∞, as a mask of attention does, the mean is −∞.

        Raises:
            ValueError: it holds a number that is not finite, or its mean is too large for its dtype.
        """
        dtype, _ = self.specs[name]
        if not dtype.is_floating_point:
            return self.sources[0].tensor(name)
        values = self.tensor(name)
        mean = weighted_mean(self._shares(name), values)
        read = [value for value, weight in zip(values, self.weights[name], strict=True) if weight]
        masked = _masked(read)
        mean = mean.masked_fill(masked, -math.inf).to(dtype)
        if not (mean.to(torch.float64).isfinite() | masked).all():
            raise ValueError(
                f"mean of {name} must fit {dtype}, got a number that is not finite; weights in [0, 1] keep it within"
            )
        return mean

    def _shares(self, name: str) -> list[float]:
        """λ of each model; times its levels over those of the result for the scale of an input, whose range, not its
        step, is averaged."""
        module = name.removesuffix(".input.scale")
        if module == name or module not in self.levels:
            return list(self.weights[name])
        ranges = [source.manifest["inputs"][module] for source in self.sources]
        levels = self.levels[module]
        return [w * ((high - low + 1) / levels) for w, (low, high) in zip(self.weights[name], ranges, strict=True)]

    def check_rest(self) -> None:
        """Refuse models whose tensors outside of quantized weights cannot be merged, as the merge would.

        Raises:
            ValueError: see :meth:`mean`.
        """
        weights = {f"{layer}.weight.{part}" for layer in self.layers for part in ("codes", "scale", "zero_point")}
        for name in self.specs.keys() - weights:
            self.mean(name)


def merged_weight_ranges(sources: Sequence[Source], bits: str | None) -> dict[str, tuple[int, int]]:
    """The range of every merged weight: the models' own, or one of ``bits`` where theirs differ."""
    result = {}
    for name in sources[0].manifest["weights"]:
        ranges = {tuple(source.manifest["weights"][name]["range"]) for source in sources}
        if len(ranges) > 1 and bits is not None:
            count, signed = BitWidths.parse(bits).weight, min(low for low, _ in ranges) < 0
            ranges = {(-(2 ** (count - 1)), 2 ** (count - 1) - 1) if signed else (0, 2**count - 1)}
        (result[name],) = ranges
    return result


def merged_input_levels(sources: Sequence[Source], bits: str | None) -> dict[str, int]:
    """How many levels every merged quantizer of activations has: the models' own, or those of ``bits``."""
    result = {}
    for name in sources[0].manifest["inputs"]:
        levels = {high - low + 1 for low, high in (source.manifest["inputs"][name] for source in sources)}
        if len(levels) > 1 and bits is not None:
            levels = {2 ** BitWidths.parse(bits).activation}
        (result[name],) = levels
    return result


def check_finite(
    name: str, values: Sequence[torch.Tensor], labels: Sequence[str], weights: Sequence[float] | None = None
) -> None:
    """Refuse a tensor that is not finite in one of the models: a merge would spread what is broken there.

    −∞ where every model has it is a mask, and stays. A model of weight 0 may hold anything, since it is not read.

    Raises:
        ValueError: the tensor, the model, how many numbers are not finite, and one of them.
    """
    weights = [1.0] * len(values) if weights is None else weights
    if not values[0].is_floating_point():
        return
    wide = [value if value.dtype.itemsize > 1 else value.float() for value in values]
    read = [(value, label) for value, label, weight in zip(wide, labels, weights, strict=True) if weight]
    if all(bool(value.isfinite().all()) for value, _ in read):
        return
    mask = _masked([value for value, _ in read])
    for value, label in read:
        broken = ~(value.isfinite() | mask)
        if broken.any():
            raise ValueError(
                f"{name} must be finite to be merged, got {int(broken.sum())} of {value.numel()} elements not, such "
                f"as {float(value[broken][0])}, in {label}; quantize or save that model anew"
            )


def _masked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where every tensor holds −∞."""
    return torch.stack([value.double() == -math.inf for value in values]).all(0)
