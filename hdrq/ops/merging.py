"""Family ``merge``: one quantized tensor from several, on their integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import flat, register
from hdrq.ops.packing import unpack

RULES = ("systematic", "noise", "half-even")
NOISES = ("all", "odd", "none")
SELECTIONS = ("min-cosine", "mean-cosine", "first", "official")
MODES = ("exact", "fast")
DRAWING = {"draws": 1, "noise": "all", "select": "min-cosine", "mode": "exact"}  # what rule "noise" alone takes
TAU = 0.1
FEW = 4  # tensors that fast draws are made of, at most: what a threshold costs doubles with each


class MergedTensor(NamedTuple):
    """What :func:`merge` returns."""

    codes: torch.Tensor  # int8 or int16, shaped as the inputs; packed: uint8, two codes to a byte
    scale: torch.Tensor  # float32: Δ* = Σ λ_k·Δ_k
    similarity: torch.Tensor  # float64 (draws, K): the cosine of each draw's step from each model; (0, K) without draws
    draw: torch.Tensor  # int64, zero-dimensional: the draw kept
    zero_point: torch.Tensor  # float32: z* = round_half_even(Σ λ_k·Δ_k·z_k / Δ*)


def merge(
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    qmin: int,
    qmax: int,
    rng: torch.Tensor,
    *,
    rule: str | None = None,
    tau: float | None = None,
    weights: Sequence[float] | None = None,
    draws: int | None = None,
    noise: str | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    select: str | None = None,
    mode: str | None = None,
    zero_points: Sequence[torch.Tensor] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    shape: Sequence[int] | None = None,
    packed: bool = False,
    extrapolate: bool = False,
) -> MergedTensor:
    """Average K quantized tensors into one on their integers; no float originals are needed.

    Equation, in float32, with ``J_k = I_k − z_k``::

        Δ* = Σ_k λ_k·Δ_k,  z* = round_half_even(Σ_k λ_k·Δ_k·z_k / Δ*),  v = Σ_k λ_k·(J_k·Δ_k) / Δ*
        I* = clamp(rounded(v) + z*, qmin, qmax)

    The mean of two integers whose sum is odd lies half-way, and rounding to nearest decides for all of them alike:
    where scales were learned, for the model of the greater ``λ_k·Δ_k``. The ``rule`` says what is done instead.

    ``"systematic"``: where v is near a tie, ``abs(y − ½) < tau`` with ``y = v − floor(v)``, it goes up with probability
    y, and so that the sum of each group of 1,024 neighbours (row-major order) stays within one step: the coins of a
    group are drawn together, by systematic sampling. Elsewhere it is rounded to nearest. One draw, one pass, one word
    of ``stream`` for each group.

    ``"noise"``: the paper's. ``I* = clamp(round_half_even(Σ_k λ_k·(J_k·Δ_k + n_k·Δ_k) / Δ*) + z*)``, n_k ~ U[−½, ½).
    Several draws may be made, all scored in one pass, and ``select`` says which is kept, by the cosines between its
    step from each model and the step to the midpoint. ``mode="exact"``: noise of input k in draw d comes from
    ``stream + k``, ``step + d``. ``mode="fast"``, for up to four tensors without extrapolation: noise can move the mean
    to one of two neighbours only, with a known probability, so a draw compares one word with one threshold; and the
    word of draw d is ``A + d·B`` modulo 2³², A and B being the element's words of ``stream`` and ``stream + 1`` at
    ``step``. Each draw has the distribution of an exact one (but a tensor with less than 2⁻¹⁴ of the noise has that
    much), and any two are independent (to 16 bits or better). Three of one element are not, but sums over many
    elements, which decide between draws, tend to be. More draws cost additions and comparisons, no random numbers.

    ``"half-even"``: to nearest, ties to even.

    Args:
        codes: 2 to 64 tensors of one shape and device: int8, int16, or :func:`hdrq.ops.pack`-ed uint8, with ``shape``.
        scales: as many float32 tensors, of one element, or ``shape[axis]`` elements each.
        qmin, qmax: the integer range of the result.
        rng: :func:`hdrq.rng_state`.
        rule: one of the above; None for ``"noise"`` where an option of its own is given, else ``"systematic"``.
        tau: how near to a tie, in [0, ½], the systematic rule draws; None for 0.1.
        weights: λ, one per tensor, summing to 1, not negative unless ``extrapolate``; None for 1/K each.
        draws: how many roundings rule ``"noise"`` tries, 1 to 65536; None for 1.
        noise: on ``"all"`` elements (also None), on none (``"none"``), or (``"odd"``) where the mean integer
            ``c = Σ λ_k·J_k`` is nearer to a tie than to an integer, ``abs(c − floor(c) − ½) < ¼``: for two tensors of
            equal weight, where the sum of the integers is odd.
        axis: the axis along which the scales vary.
        group_size: neighbours along the last axis that share a scale and a zero point, of which there is then one for
            each such group, ``(*shape[:-1], shape[-1] / group_size)``; None for no groups.
        select: the first draw of the greatest smallest (``"min-cosine"``, also None) or mean (``"mean-cosine"``)
            cosine; the ``"first"``; or the released code's rule (``"official"``): a draw replaces the one kept so far
            if all cosines rise. Cosines within 1e-6 of each other are equal.
        mode: how draws are made; None for ``"exact"``.
        zero_points: integer-valued float32 tensors shaped as the scales; None for 0.
        ranges: (qmin, qmax) of each input, where models differ in bits; None for that of the result.
        shape: of the tensors, where codes are packed.
        packed: pack the result.
        extrapolate: allow negative weights. Δ* must still be positive.

    Raises:
        TypeError, ValueError: "X must be …, got …". Values of codes and scales are checked on CPU tensors only.

    Source: noise: HDRQ (Shin et al., ICML 2025), Eq. 12, generalised to K models. Systematic: ours; the sampling is
    Madow's (Annals of Mathematical Statistics, 1949).
    """
    codes, scales = list(codes), list(scales)
    count = checks.integer("the number of tensors", len(codes), 2, 64)
    lam = list(checks.mixing_weights(weights, count, extrapolate))
    drawing = {"draws": draws, "noise": noise, "select": select, "mode": mode}
    rule = rule_of(rule, tau, drawing)
    ranges = [(qmin, qmax)] * count if ranges is None else list(ranges)
    zeros = [torch.zeros_like(s) for s in scales] if zero_points is None else list(zero_points)
    for name, values in (("scales", scales), ("zero_points", zeros), ("ranges", ranges)):
        if len(values) != count:
            raise ValueError(f"{name} must be as many as codes, {count}, got {len(values)}")
    if shape is None:
        if any(isinstance(c, torch.Tensor) and c.dtype == torch.uint8 for c in codes):
            raise ValueError("shape must be given with packed codes, got None")
        checks.tensor("codes[0]", codes[0], checks.CODES)
        shape = codes[0].shape
    whole = torch.Size(shape)
    if group_size is not None:
        grid = checks.groups("codes", whole, axis, group_size)
        codes, shape, axis = _rows(codes, scales, zeros, whole, grid, group_size), (math.prod(grid), group_size), 0
    flat = [bound for each in ranges for bound in each]
    tensors = (codes, scales, zeros, flat, qmin, qmax, rng, lam)
    if rule == "noise":
        chosen = [default if drawing[name] is None else drawing[name] for name, default in DRAWING.items()]
        rest = (*chosen[:2], axis, *chosen[2:], list(shape), packed)
        _check(*tensors, *rest)
        merged, scale, zero_point, similarity, draw = _merge_op(*tensors, *rest)
    else:
        near = 0.0 if rule == "half-even" else TAU if tau is None else tau
        _check_systematic(*tensors, near, axis, list(shape), packed)
        merged, scale, zero_point = _systematic_op(*tensors, near, axis, list(shape), packed)
        similarity, draw = scale.new_empty((0, count), dtype=torch.float64), scale.new_zeros((), dtype=torch.int64)
    if group_size is not None:
        merged, scale, zero_point = merged if packed else merged.view(whole), scale.view(grid), zero_point.view(grid)
    return MergedTensor(merged, scale, similarity, draw, zero_point)


def _rows(codes, scales, zero_points, shape, grid, group_size) -> list[torch.Tensor]:
    """Codes with groups of neighbours as rows; packed codes lie in memory as they do."""
    for k, code in enumerate(codes):
        checks.tensor(f"codes[{k}]", code, (*checks.CODES, torch.uint8))
        checks.per_group(f"scales[{k}]", scales[k], grid, group_size)
        checks.per_group(f"zero_points[{k}]", zero_points[k], grid, group_size)
    return [c.reshape(-1, group_size) if c.shape == shape and c.dtype != torch.uint8 else c for c in codes]


def rule_of(rule: str | None, tau: float | None, drawing: dict[str, Any], rules: tuple[str, ...] = RULES) -> str:
    """The rule that is meant, once the options given fit it.

    Args:
        drawing: the options of rule ``"noise"`` by name; None for what is not given.

    Raises:
        TypeError, ValueError: there is no such rule, or an option belongs to another.
    """
    given = {name: value for name, value in drawing.items() if value is not None}
    if rule is None:
        rule = "noise" if given else "systematic"
    checks.choice("rule", rule, rules)
    strange = given if rule != "noise" else {}
    if tau is not None and rule != "systematic":
        strange = {"tau": tau, **strange}
    for name, value in strange.items():
        owner = "systematic" if name == "tau" else "noise"
        raise ValueError(f'{name} must be left out but for rule "{owner}", got {value!r} for rule "{rule}"')
    return rule


def _check(
    codes, scales, zero_points, ranges, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, packed
) -> int | None:
    checks.integer("draws", draws, 1, 2**16)
    for name, value, choices in (("noise", noise, NOISES), ("select", select, SELECTIONS), ("mode", mode, MODES)):
        checks.choice(name, value, choices)
    if mode == "fast" and (len(codes) > FEW or min(weights) < 0):
        raise ValueError(
            f'mode must be "exact" but for {FEW} tensors or less without extrapolation, got "fast" for λ = {weights}'
        )
    return _check_tensors(codes, scales, zero_points, ranges, qmin, qmax, rng, axis, shape, packed)


def _check_systematic(
    codes, scales, zero_points, ranges, qmin, qmax, rng, weights, tau, axis, shape, packed
) -> int | None:
    checks.real("tau", tau, 0.0, 0.5)
    return _check_tensors(codes, scales, zero_points, ranges, qmin, qmax, rng, axis, shape, packed)


def _check_tensors(codes, scales, zero_points, ranges, qmin, qmax, rng, axis, shape, packed) -> int | None:
    device = codes[0].device
    checks.quant_range(qmin, qmax)
    checks.rng(rng, device)
    if packed:
        checks.packed_range("qmin and qmax", qmin, qmax)
    logical = torch.empty(shape, device="meta")
    axis = checks.axis_of(logical, axis)
    length = 1 if axis is None else logical.shape[axis]
    for k, code in enumerate(codes):
        checks.tensor(f"codes[{k}]", code, (*checks.CODES, torch.uint8), device)
        low, high = ranges[2 * k : 2 * k + 2]
        checks.quant_range(low, high)
        if code.dtype == torch.uint8:
            checks.packed(f"codes[{k}]", code, logical.numel(), device)
            checks.packed_range(f"ranges[{k}]", low, high)
        else:
            checks.same_shape(f"codes[{k}]", code, "codes[0]", logical)
        for name, value in ((f"scales[{k}]", scales[k]), (f"zero_points[{k}]", zero_points[k])):
            checks.per_axis(name, value, code.new_empty(length), None if axis is None else 0)
    return axis


def _check_values(codes, scales, zero_points, ranges, weights, shape) -> list[bool]:
    """Refuse values that no backend may see; returns which inputs are signed."""
    signed = [low < 0 for low in ranges[::2]]
    for k, (code, scale, zero) in enumerate(zip(codes, scales, zero_points, strict=True)):
        checks.scale_values(f"scales[{k}]", scale)
        checks.zero_point_values(zero)
        if code.dtype != torch.uint8 or ranges[2 * k + 1] - ranges[2 * k] < 15:
            plain = unpack(code, shape, signed=signed[k]) if code.dtype == torch.uint8 else code
            checks.code_values(f"codes[{k}]", plain, *ranges[2 * k : 2 * k + 2])
    if min(weights) < 0:
        checks.scale_values("the merged scale", sum(w * s for w, s in zip(weights, scales, strict=True)))
    return signed


def _laid_out(codes, scales, zero_points) -> tuple[list, list, list]:
    """Tensors as the backends take them."""
    return [c.contiguous() for c in codes], [flat(s) for s in scales], [flat(z) for z in zero_points]


def _merge(
    codes, scales, zero_points, ranges, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, packed
):
    axis = _check(
        codes, scales, zero_points, ranges, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, packed
    )
    signed = _check_values(codes, scales, zero_points, ranges, weights, shape)
    run = implementation("merging", "merge", codes[0])
    args = (flat(rng), weights, draws, noise, axis, select, mode, torch.Size(shape), signed, packed)
    return run(*_laid_out(codes, scales, zero_points), qmin, qmax, *args)


def _systematic(codes, scales, zero_points, ranges, qmin, qmax, rng, weights, tau, axis, shape, packed):
    axis = _check_systematic(codes, scales, zero_points, ranges, qmin, qmax, rng, weights, tau, axis, shape, packed)
    signed = _check_values(codes, scales, zero_points, ranges, weights, shape)
    run = implementation("systematic", "merge_systematic", codes[0])
    args = (flat(rng), weights, float(np.float32(tau)), axis, torch.Size(shape), signed, packed)
    return run(*_laid_out(codes, scales, zero_points), qmin, qmax, *args)


def _merge_fake(
    codes, scales, zero_points, ranges, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, packed
):
    _check(
        codes, scales, zero_points, ranges, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, packed
    )
    return (
        *_empty(codes, scales, qmin, qmax, shape, packed),
        codes[0].new_empty((draws, len(codes)), dtype=torch.float64),
        codes[0].new_empty((), dtype=torch.int64),
    )


def _systematic_fake(codes, scales, zero_points, ranges, qmin, qmax, rng, weights, tau, axis, shape, packed):
    _check_systematic(codes, scales, zero_points, ranges, qmin, qmax, rng, weights, tau, axis, shape, packed)
    return _empty(codes, scales, qmin, qmax, shape, packed)


def _empty(codes, scales, qmin, qmax, shape, packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, Δ* and z*, without values."""
    size, dtype = (shape, checks.code_range(qmin, qmax))
    if packed:
        size, dtype = [(torch.Size(shape).numel() + 1) // 2], torch.uint8
    grid = scales[0]
    return codes[0].new_empty(size, dtype=dtype), grid.new_empty(grid.numel()), grid.new_empty(grid.numel())


_TENSORS = "Tensor[] codes, Tensor[] scales, Tensor[] zero_points, int[] ranges, int qmin, int qmax, Tensor rng"
_merge_op = register(
    f"merge({_TENSORS}, float[] weights, int draws, str noise, int? axis, str select, str mode, SymInt[] shape, "
    "bool packed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _merge,
    _merge_fake,
)
_systematic_op = register(
    f"merge_systematic({_TENSORS}, float[] weights, float tau, int? axis, SymInt[] shape, bool packed) "
    "-> (Tensor, Tensor, Tensor)",
    _systematic,
    _systematic_fake,
)
