"""Random cases of every op: what it is given, how it is run, what its results may differ by.

An op joins with one entry of :data:`OPS`. A case is a function of op, seed and number alone, so it can be repeated
anywhere. Used by :mod:`hdrq.parity`.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hdrq import checks, ops
from hdrq.backends.dispatch import use_backend
from hdrq.backends.eager import per_element, sum_but
from hdrq.ops.fakequant import GRADIENTS, ROUNDINGS
from hdrq.rng import LOW, rng_state

SUM_BOUND = 1e-6  # of a sum, relative to the sum of magnitudes (docs/contract.md)
SEARCH_BOUND = 1e-5  # of a searched scale's error, relative to the least
SMALL, LARGE = 2_000, 200_000  # about the most elements of a case of even and of odd number
EXTREMES = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 3e38, 1e-40, torch.nan])


class Draw:
    """The random arguments of one case."""

    def __init__(self, op: str, seed: int, number: int):
        self.random = random.Random(f"{op} {seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.largest = LARGE if number % 2 else SMALL
        self.grouping = random.Random(f"{op} {seed} {number} groups")

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def choice(self, *values: Any) -> Any:
        return self.random.choice(values)

    def shape(self, empty: bool = True) -> tuple[int, ...]:
        """Up to four dimensions; sometimes none, sometimes no element."""
        if empty and self.chance(0.03):
            return (3, 0, 2)
        elements = self.largest ** self.random.random()
        cuts = sorted(self.random.random() for _ in range(self.random.randrange(4)))
        if self.chance(0.05):
            return ()
        return tuple(max(1, round(elements ** (b - a))) for a, b in zip((0.0, *cuts), (*cuts, 1.0), strict=True))

    def axis(self, shape: tuple[int, ...]) -> int | None:
        return self.random.randrange(-len(shape), len(shape)) if shape and self.chance(0.6) else None

    def group_size(self, *lengths: int) -> int | None:
        """Sometimes a size of groups, which divides the last axis of tensors of these lengths there."""
        common = math.gcd(*lengths)
        if common < 2 or self.grouping.random() > 0.25:
            return None
        return self.grouping.choice([size for size in range(1, common + 1) if common % size == 0])

    def dtype(self) -> torch.dtype:
        return self.choice(*checks.FLOATS)

    def quant_range(self) -> tuple[int, int]:
        """Signed, unsigned or lopsided, 2 to 16 bits, inside int16."""
        bits = self.random.randint(2, 15)
        return self.choice((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1), (-bits, 3 * bits))

    def rng(self) -> torch.Tensor:
        """A state whose stream and step may be about to wrap."""
        stream, step = (self.choice(self.random.getrandbits(32), LOW, 0) for _ in range(2))
        return rng_state(self.random.getrandbits(64), stream, step)

    def laid_out(self, shape: tuple[int, ...], fill: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
        """A tensor of ``shape``, filled in memory of one layout or another."""
        layouts = ["contiguous", "offset"]
        if shape:
            layouts += ["transposed", "strided", "expanded"]
        if len(shape) == 4:
            layouts.append("channels_last")
        layout = self.random.choice(layouts)
        if layout == "offset":
            return fill((torch.Size(shape).numel() + 1,))[1:].view(shape)
        if layout == "transposed":
            return fill(shape[::-1]).permute(*reversed(range(len(shape))))
        if layout == "strided":
            return fill((*shape[:-1], 2 * shape[-1]))[..., ::2]
        if layout == "expanded":
            return fill((1, *shape[1:])).expand(shape)
        return fill(shape).to(memory_format=torch.channels_last) if layout == "channels_last" else fill(shape)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
        return self.laid_out(shape, lambda size: (torch.randn(size, generator=self.generator) * spread).to(dtype))

    def codes(self, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return self.laid_out(shape, lambda size: torch.randint(low, high + 1, size, generator=self.generator).to(dtype))

    def grid(self, *, nan: bool = True) -> dict[str, Any]:
        """``x`` and what quantizes it: many elements inside the range, some outside, ties, extremes."""
        shape, (qmin, qmax) = self.shape(), self.quant_range()
        axis, group_size = self.axis(shape), self.group_size(*shape[-1:])
        axis = axis if group_size is None else None
        step = 2.0 ** self.random.randint(-12, 2)
        scale = (1 + torch.rand(scales_shape(shape, axis, group_size), generator=self.generator)) * step
        if ties := self.chance(0.4):
            scale[:] = step
        reach = (qmax - qmin) * self.choice(0.2, 0.6) * step
        extremes = EXTREMES if nan else EXTREMES[:-1]

        def fill(size: tuple[int, ...]) -> torch.Tensor:
            x = torch.randn(size, generator=self.generator) * reach
            x = (x / step * 4).round() / 4 * step if ties else x
            if special and x.numel():
                where, which = (torch.randint(n, (4,), generator=self.generator) for n in (x.numel(), len(extremes)))
                x.view(-1)[where] = extremes[which]
            return x.to(kind)

        special, kind = self.chance(0.4), self.dtype()
        along = {"axis": axis, "group_size": group_size}
        return {"x": self.laid_out(shape, fill), "scale": scale, "qmin": qmin, "qmax": qmax} | along

    def zero_point(self, grid: dict[str, Any]) -> torch.Tensor | None:
        low, high = max(grid["qmin"], -100), min(grid["qmax"], 100)
        drawn = torch.randint(low, high + 1, grid["scale"].shape, generator=self.generator).float()
        return drawn if self.chance(0.5) else None

    def trained(self, grid: dict[str, Any]) -> dict[str, Any]:
        """A grid with an upstream gradient and a factor on the scale's."""
        x = grid["x"]
        return grid | {"grad": self.normal(tuple(x.shape), x.dtype), "grad_scale": self.choice(1.0, 0.03)}


def scales_shape(shape: tuple[int, ...], axis: int | None, group_size: int | None) -> tuple[int, ...]:
    """The shape of the scales of a tensor."""
    if group_size is not None:
        return checks.groups("x", shape, axis, group_size)
    return (1 if axis is None else shape[axis],)


def sum_of_scales(values: torch.Tensor, axis: int | None, group_size: int | None) -> torch.Tensor:
    """The sum over the elements of each scale."""
    if group_size is not None:
        return values.unflatten(-1, (-1, group_size)).sum(-1)
    return sum_but(values, checks.axis_of(values, axis))


@dataclass(frozen=True)
class Close:
    """A result that is not compared bit by bit: within ``bound`` of the reference, relative to a magnitude.

    Half types may differ by one rounding besides.
    """

    magnitude: Callable[[dict[str, Any], torch.Tensor], torch.Tensor]  # of the case's arguments and the reference
    bound: float = SUM_BOUND


@dataclass(frozen=True)
class Op:
    """How a case of an op is drawn, run and compared."""

    family: str
    arguments: Callable[[Draw], dict[str, Any]]  # by name; "grad" is the upstream gradient
    leaves: tuple[str, ...] = ()  # arguments whose gradient is compared
    close: dict[str, Close] = field(default_factory=dict)  # the results that are sums; all others are bits
    call: Callable[..., Any] | None = None  # None: the function of hdrq.ops with the name that stands before a comma


def terms(op: str, leaf: str = "scale") -> Close:
    """The gradient of a leaf: a sum, whose terms appear when the reference gives each element a scale of its own."""

    def magnitude(arguments: dict[str, Any], want: torch.Tensor) -> torch.Tensor:
        x, axis, group_size = (arguments[name] for name in ("x", "axis", "group_size"))
        flat = dict(arguments)
        for name, value in arguments.items():
            if name in ("scale", "zero_point") and value is not None and group_size is not None:
                flat[name] = value.flatten().repeat_interleave(group_size)
            elif name in ("scale", "zero_point") and value is not None:
                flat[name] = per_element(value, x.ndim, checks.axis_of(x, axis)).expand(x.shape).flatten()
            elif isinstance(value, torch.Tensor) and value.shape == x.shape:
                flat[name] = value.flatten()
        with use_backend("reference"):
            parts = run(op, flat | {"axis": 0, "group_size": None})[f"grad {leaf}"]
        return sum_of_scales(parts.abs().reshape(x.shape), axis, group_size).reshape(want.shape)

    return Close(magnitude)


ITSELF = Close(lambda arguments, want: want.double().abs())
ONE = Close(lambda arguments, want: torch.ones_like(want, dtype=torch.float64))


def noise(draw: Draw) -> dict[str, Any]:
    options = {"noise": draw.choice("uniform", "empirical"), "keep": draw.choice(1.0, 0.6)}
    return draw.trained(draw.grid()) | {"rng": draw.rng()} | options


def fakequant(draw: Draw) -> dict[str, Any]:
    grid = draw.trained(draw.grid())
    return grid | {"zero_point": draw.zero_point(grid), "keep": draw.choice(1.0, 0.6), "rng": draw.rng()}


def conventions(draw: Draw) -> dict[str, Any]:
    """As other codes round and differentiate, with a zero point that learns."""
    arguments = fakequant(draw)
    arguments["rounding"] = draw.choice(*ROUNDINGS)
    arguments["gradient"] = draw.choice(*GRADIENTS)
    if arguments["zero_point"] is None:
        arguments["zero_point"] = torch.zeros_like(arguments["scale"])
    if arguments["rounding"] == "shifted":
        arguments["zero_point"] += draw.choice(0.0, 0.5, 0.3)
    return arguments


def finite(draw: Draw) -> dict[str, Any]:
    grid = draw.grid(nan=False)
    return grid | {"zero_point": draw.zero_point(grid)}


def coded(draw: Draw) -> dict[str, Any]:
    grid = finite(draw)
    x, dtype = grid.pop("x"), checks.code_range(grid.pop("qmin"), grid.pop("qmax"))
    return grid | {"codes": draw.codes(tuple(x.shape), torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)}


def learned(draw: Draw) -> dict[str, Any]:
    grid = draw.grid()
    x = grid["x"]
    return grid | {"alpha": 2 * draw.normal(tuple(x.shape), torch.float32), "zero_point": draw.zero_point(grid)}


def adaround_regularized(alpha, **arguments) -> dict[str, torch.Tensor]:
    """Weights, penalty, and the gradient of both together."""
    y, penalty = ops.adaround_regularized(alpha=alpha.requires_grad_(), **arguments)
    loss = y.nan_to_num(0, 0, 0).float().sum() + 0.01 * penalty
    return {"y": y, "penalty": penalty, "grad alpha": torch.autograd.grad(loss, alpha)[0]}


def mixed(draw: Draw) -> dict[str, Any]:
    shape, dtype = draw.shape(), draw.dtype()
    tensors = {name: draw.normal(shape, dtype) for name in ("a", "b", "grad")}
    return tensors | {"p": draw.choice(0.0, 0.5, 1.0, draw.random.random()), "rng": draw.rng()}


def moved(draw: Draw) -> dict[str, Any]:
    shape, dtype = draw.shape(), draw.dtype()
    return {"w": draw.normal(shape, dtype), "w_src": draw.normal(shape, dtype), "grad": draw.normal((), torch.float32)}


def block(draw: Draw) -> dict[str, Any]:
    """Weights of one dtype, each with its scale and its range; with noise or not, with sources or not."""
    count, dtype, rows = draw.random.randint(1, 3), draw.dtype(), draw.random.randint(1, 9)
    shapes = [(rows, *draw.shape()) for _ in range(count)]
    axis, ranges = draw.choice(None, 0), [draw.quant_range() for _ in shapes]
    group_size = draw.group_size(*(shape[-1] for shape in shapes))
    axis = axis if group_size is None else None
    sizes = [scales_shape(shape, axis, group_size) for shape in shapes]
    return {
        "weights": [draw.normal(shape, dtype) for shape in shapes],
        "scales": [(1 + torch.rand(n, generator=draw.generator)) / h for n, (_, h) in zip(sizes, ranges, strict=True)],
        "ranges": ranges,
        "sources": [draw.normal(shape, dtype) for shape in shapes] if draw.chance(0.7) else None,
        "rngs": [draw.rng() for _ in shapes] if draw.chance(0.7) else None,
        "noise": draw.choice("uniform", "empirical"),
        "axis": axis,
        "group_size": group_size,
    }


def quantize_weights(weights, **options) -> dict[str, torch.Tensor]:
    """All that a block's weights become, and their gradients where each result is as important as another."""
    for tensor in (*weights, *options["scales"]):
        tensor.requires_grad_()
    results, distances = ops.quantize_weights(weights, **options)
    total = torch.stack([y.float().square().sum() for y in results]).sum()
    (total if distances is None else total + distances.sum()).backward()
    named = {f"weight {k}": y for k, y in enumerate(results)} | {f"grad {k}": w.grad for k, w in enumerate(weights)}
    return named if distances is None else named | {"distances": distances}


def searched(draw: Draw) -> dict[str, Any]:
    shape, (qmin, qmax) = draw.shape(empty=False), draw.quant_range()
    x = draw.normal(shape, draw.dtype(), 2.0 ** draw.random.randint(-8, 3))
    axis = draw.axis(shape)
    if axis is not None and shape[axis] > 8:  # an interpreter takes milliseconds for a row and a candidate
        axis = None
    group_size = draw.group_size(*shape[-1:]) if len(shape) == 1 else None
    if group_size is not None:
        axis, group_size = None, max(group_size, shape[-1] // 4 if shape[-1] % 4 == 0 else shape[-1])
    options = {"norm": draw.choice(2.4, 2.0, 1.0), "candidates": draw.choice(20, 100), "axis": axis}
    options |= {"group_size": group_size}
    return {"x": x, "qmin": qmin, "qmax": qmax} | options


def searched_affine(draw: Draw) -> dict[str, Any]:
    """Few pairs, since the reference and an interpreter take their time for each."""
    draw.largest = SMALL
    qmin, qmax = draw.choice((-2, 1), (0, 7), (-3, 4))
    return searched(draw) | {"qmin": qmin, "qmax": qmax, "candidates": draw.choice(1, 3, 10)}


def search_error(x, qmin, qmax, axis, group_size, affine=False, **options) -> dict[str, torch.Tensor]:
    """The error that the scale found leaves: scales of equal error may differ."""
    search = ops.search_affine if affine else ops.search_scale
    found = search(x, qmin, qmax, axis=axis, group_size=group_size, **options)
    scale, zero_point = (t.cpu() for t in found) if isinstance(found, tuple) else (found.cpu(), None)
    x = x.cpu().float()
    with use_backend("reference"):
        y = ops.fake_quantize(x, scale, qmin, qmax, zero_point=zero_point, axis=axis, group_size=group_size)
    return {"error": sum_of_scales((y - x).double().abs() ** options["norm"], axis, group_size)}


def merged(draw: Draw) -> dict[str, Any]:
    """Codes of one range, packed or not, in scales that differ by up to three times; sometimes with zero points."""
    packed = draw.chance(0.3)
    shape, (qmin, qmax) = draw.shape(), draw.choice((-8, 7), (0, 15), (-2, 1)) if packed else draw.quant_range()
    axis, mode = draw.axis(shape), draw.choice("exact", "fast")
    models = draw.random.randint(2, 4)
    group_size = draw.group_size(*shape[-1:])
    axis = axis if group_size is None else None
    size = scales_shape(shape, axis, group_size)
    scales = [torch.rand(size, generator=draw.generator) + 0.5 for _ in range(models)]
    raw = torch.rand(models, generator=draw.generator) + 0.1
    zeros = [torch.randint(qmin, qmax + 1, size, generator=draw.generator).float() for _ in range(models)]
    codes = [draw.codes(shape, qmin, qmax, checks.code_range(qmin, qmax)) for _ in range(models)]
    options = {
        "weights": draw.choice(None, tuple((raw / raw.sum()).double().tolist())),
        "draws": draw.random.randint(1, 4),
        "noise": draw.choice("all", "odd", "none"),
        "axis": axis,
        "group_size": group_size,
        "mode": mode,
        "zero_points": draw.choice(None, zeros),
        "shape": shape,
        "packed": packed,
    }
    codes = [ops.pack(c) for c in codes] if packed else codes
    return {"codes": codes, "scales": scales, "qmin": qmin, "qmax": qmax, "rng": draw.rng()} | options


def merge(codes, scales, qmin, qmax, rng, draws, **options) -> dict[str, torch.Tensor]:
    """The codes of the first draw, bit by bit, and of the draw kept, which is as good as the reference's.

    Cosines are sums: where two draws are as good, backends may keep one or the other.
    """
    first = ops.merge(codes, scales, qmin, qmax, rng, draws=1, **options)
    best = ops.merge(codes, scales, qmin, qmax, rng, draws=draws, **options)
    kept = rng + torch.stack((torch.zeros_like(best.draw), torch.zeros_like(best.draw), best.draw))
    again = ops.merge(codes, scales, qmin, qmax, kept, draws=1, **options)
    results = {"codes": first.codes, "scale": best.scale, "zero point": best.zero_point}
    if options["mode"] == "exact":  # a fast draw is a function of its number, not of a step
        results["codes of another draw"] = best.codes != again.codes
    if first.codes.numel() >= 64:  # of fewer, a step may vanish and leave its cosine to rounding
        results |= {"similarity": best.similarity, "best": best.similarity.amin(1)[best.draw]}
    return results


def merged_at_once(draw: Draw) -> dict[str, Any]:
    """As above, of any rule that draws once; half of the scales are nearly equal, which makes near-ties of all."""
    arguments = merged(draw)
    for name in ("draws", "noise", "mode"):
        del arguments[name]
    if draw.chance(0.5):
        arguments["scales"] = [arguments["scales"][0] * (1 + 0.001 * k) for k in range(len(arguments["scales"]))]
    rule = draw.choice("systematic", "half-even")
    return arguments | {"rule": rule, "tau": draw.choice(None, 0.0, 0.3, 0.5) if rule == "systematic" else None}


def merge_at_once(codes, scales, qmin, qmax, rng, **options) -> dict[str, torch.Tensor]:
    result = ops.merge(codes, scales, qmin, qmax, rng, **options)
    return {"codes": result.codes, "scale": result.scale, "zero point": result.zero_point}


def nibbles(draw: Draw) -> dict[str, Any]:
    low, dtype = draw.choice(-8, 0), draw.choice(*checks.CODES)
    return {"codes": draw.codes(draw.shape(), low, low + 15, dtype)}


def unpack(codes) -> torch.Tensor:
    return ops.unpack(ops.pack(codes), codes.shape, signed=bool((codes < 0).any()))


BLOCK_GRADIENTS = {f"grad {k}": ONE for k in range(3)}  # a norm, which is a sum, has its part in them
SEARCHED = {"error": Close(ITSELF.magnitude, SEARCH_BOUND)}
OPS: dict[str, Op] = {
    "noise_quantize": Op("noise", noise, ("x", "scale"), {"grad scale": terms("noise_quantize")}),
    "fake_quantize": Op("fakequant", fakequant, ("x", "scale"), {"grad scale": terms("fake_quantize")}),
    "fake_quantize, conventions": Op(
        "fakequant",
        conventions,
        ("x", "scale", "zero_point"),
        {f"grad {leaf}": terms("fake_quantize, conventions", leaf) for leaf in ("scale", "zero_point")},
    ),
    "quantize": Op("fakequant", finite),
    "dequantize": Op("fakequant", coded),
    "adaround": Op("rounding", lambda draw: learned(draw) | {"hard": draw.chance(0.5)}),
    "adaround_regularized": Op(
        "rounding",
        lambda draw: learned(draw) | {"beta": draw.choice(2.0, 5.5, 20.0)},
        (),
        {"penalty": Close(lambda arguments, want: torch.tensor(2.0 * arguments["x"].numel()))},
        adaround_regularized,
    ),
    "drop_mix": Op("drop", mixed, ("a", "b")),
    "source_distance": Op("distance", moved, ("w",), {"y": ITSELF, "grad w": ITSELF}),
    "quantize_weights": Op("weights", block, (), {"distances": ITSELF} | BLOCK_GRADIENTS, quantize_weights),
    "search_scale": Op("ranges", searched, (), SEARCHED, search_error),
    "search_affine": Op("ranges", searched_affine, (), SEARCHED, partial(search_error, affine=True)),
    "pack": Op("merging", nibbles),
    "unpack": Op("merging", nibbles, call=unpack),
    "merge": Op("merging", merged, (), {"similarity": ONE, "best": ONE}, merge),
    "merge_systematic": Op("systematic", merged_at_once, call=merge_at_once),
}


def run(op: str, arguments: dict[str, Any], device: str = "cpu") -> dict[str, torch.Tensor]:
    """The results of an op by name, on the CPU: what it returns, and the gradients of its leaves."""
    given = {name: _placed(value, device) for name, value in arguments.items()}
    upstream = given.pop("grad", None)
    leaves = {name: given[name].requires_grad_() for name in OPS[op].leaves}
    call = OPS[op].call or getattr(ops, op.partition(",")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities in Triton's interpreter
        results = call(**given)
        results = results if isinstance(results, dict) else {"y": results}
        if leaves:
            gradients = torch.autograd.grad(results["y"], list(leaves.values()), upstream)
            results |= {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: r.detach().cpu() for name, r in results.items()}


def _placed(value: Any, device: str) -> Any:
    """A copy of an argument on a device, in the memory layout that it has."""
    if isinstance(value, list):
        return [_placed(v, device) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset()).detach()
