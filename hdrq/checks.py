"""Every validator of the package and its message: "X must be …, got …"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.int16)
T = TypeVar("T")


def integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int in [low, high]."""
    # The exact type is asked first: ops of a training step pass here, and an abstract base class is slow.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return int(value)


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a finite float in [low, high]."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and low <= float(value) <= high):
        bounds = "finite" if math.isinf(low) and math.isinf(high) else f"finite and in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return float(value)


def device(name: str) -> torch.device:
    """The device of a name, if tensors can be there."""
    if not isinstance(name, str | torch.device):
        raise TypeError(f'device must be a name, like "cpu" or "cuda", got {type(name).__name__}')
    try:
        found = torch.device(name)
        if found.type == "meta":
            raise ValueError(f"device must be one that holds values, got {str(name)!r}")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that is here, got {name!r}: {str(error).splitlines()[0]:.150}") from error
    return found


def made_of(kind: Callable[..., T], options: Mapping[str, Any]) -> T:
    """A dataclass of options, each the name of a field."""
    known = tuple(sorted(field.name for field in fields(kind)))  # type: ignore[arg-type]
    for name in options:
        choice("an option", name, known)
    return kind(**options)


def choice(name: str, value: Any, choices: tuple) -> Any:
    """``value`` if it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> torch.Tensor:
    """``value`` as a tensor of one of ``dtypes``, on ``device`` where one is given (that of ``x``)."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        wanted = " or ".join(short(d) for d in dtypes)
        got = short(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of {wanted}, got {got}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, where x is, got {value.device}")
    return value


def finite(name: str, value: torch.Tensor) -> torch.Tensor:
    """``value`` without NaN and infinity; read on any device."""
    wrong = int((~value.isfinite()).sum())
    if wrong:
        raise ValueError(f"{name} must be finite, got {wrong} of {value.numel()} elements that are not")
    return value


def rng(value: Any, device: torch.device) -> torch.Tensor:
    """``value`` as a random state: an int64 tensor of shape (3,) on ``device``."""
    tensor("rng", value, (torch.int64,), device)
    if value.shape != (3,):
        raise ValueError(f"rng must have shape (3,): seed, stream, step; got {tuple(value.shape)}")
    return value


def keep_threshold(name: str, probability: Any) -> int:
    """A probability in [0, 1] as the integer that a coin of 16 bits must stay below."""
    return round(real(name, probability, 0.0, 1.0) * 2**16)


def quant_range(qmin: Any, qmax: Any) -> None:
    """``qmin < qmax``, a range of at most 2¹⁶ integers that a zero point of 16 bits, signed or unsigned, can give."""
    integer("qmin", qmin, -(2**16 - 1), 2**16 - 1)
    integer("qmax", qmax, -(2**16 - 1), 2**16 - 1)
    if qmin >= qmax:
        raise ValueError(f"qmin must be less than qmax, got qmin={qmin}, qmax={qmax}")
    if qmax - qmin > 2**16 - 1:
        raise ValueError(f"qmax - qmin must be at most {2**16 - 1}, got {qmax - qmin}")


def code_range(qmin: int, qmax: int) -> torch.dtype:
    """The dtype that holds the codes of a range: int8, else int16."""
    if qmin < -(2**15) or qmax > 2**15 - 1:
        raise ValueError(f"qmin and qmax must fit int16 for integer codes, got qmin={qmin}, qmax={qmax}")
    return torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16


def bits(name: str, value: Any) -> int:
    """``value`` as a bit width: 2 to 16."""
    return integer(name, value, 2, 16)


def axis_of(x: torch.Tensor, axis: Any) -> int | None:
    """``axis`` counted from the front, or None."""
    if axis is None:
        return None
    if type(axis) is not int and (isinstance(axis, bool) or not isinstance(axis, Integral)):
        raise TypeError(f"axis must be an int or None, got {type(axis).__name__}")
    ndim = x.ndim
    if not -ndim <= int(axis) < ndim:
        raise ValueError(f"axis must be in [{-ndim}, {ndim - 1}] for a tensor of {ndim} dimensions, got {axis}")
    return int(axis) % ndim


def per_axis(name: str, value: Any, x: torch.Tensor, axis: int | None) -> torch.Tensor:
    """``value`` as a float32 tensor of one element, or of ``x.shape[axis]`` elements, on the device of ``x``."""
    tensor(name, value, (torch.float32,), x.device)
    wanted = 1 if axis is None else x.shape[axis]
    if value.numel() != wanted:
        where = "" if axis is None else f", the length of axis {axis}"
        raise ValueError(f"{name} must have {wanted} element{'' if wanted == 1 else 's'}{where}, got {value.numel()}")
    return value


def groups(name: str, shape: Sequence[int], axis: Any, group_size: Any) -> tuple[int, ...]:
    """The shape of the scales of a tensor in groups of ``group_size`` neighbours along its last axis."""
    if axis is not None:
        raise ValueError(f"axis must be None with a group_size, whose groups lie along the last axis, got {axis}")
    integer("group_size", group_size, 1, 2**31 - 1)
    if not len(shape) or shape[-1] % group_size:
        raise ValueError(
            f"group_size must divide the last axis of {name}, got {group_size} for the shape {tuple(shape)}"
        )
    return (*shape[:-1], shape[-1] // group_size)


def per_group(name: str, value: Any, shape: Sequence[int], group_size: int) -> None:
    """``value`` as one number for each group, ``shape`` of them."""
    tensor(name, value, (torch.float32,))
    if value.numel() != math.prod(shape):
        raise ValueError(
            f"{name} must have {math.prod(shape)} elements, one for each group of {group_size}, got {value.numel()}"
        )


def scale_values(name: str, scale: torch.Tensor) -> None:
    """Positive and finite, on a CPU. Elsewhere a value is not read: the op yields NaN where the scale is neither."""
    if scale.device.type != "cpu":
        return
    if scale.numel() == 1 and 0 < scale.item() < math.inf:  # the commonest case, without the price of an array
        return
    values = scale.detach().numpy()
    if values.size and not (values.min() > 0 and values.max() < math.inf):
        wrong = ~((values > 0) & (values < np.inf))
        raise ValueError(f"{name} must be positive and finite, got {values[wrong][0]}")


def zero_point_values(zero_point: torch.Tensor | None, *, integers: bool = True) -> None:
    """Integers (or any numbers) of at most 2¹⁶, on a CPU. Elsewhere a value is not read."""
    if zero_point is None or zero_point.device.type != "cpu":
        return
    if zero_point.numel() == 1:  # the commonest case, without the price of arrays
        value = float(zero_point.item())
        if abs(value) <= 2**16 and (not integers or value.is_integer()):
            return
    values = zero_point.detach().numpy()
    wrong = ~((np.abs(values) <= 2**16) & ((values == np.rint(values)) | (not integers)))
    if wrong.any():
        what = "an integer" if integers else "a number"
        raise ValueError(f"zero_point must be {what} of magnitude at most {2**16}, got {values[wrong][0]}")


def code_values(name: str, codes: torch.Tensor, qmin: int, qmax: int) -> None:
    """Inside [qmin, qmax], on a CPU. Elsewhere a value is not read."""
    if codes.device.type != "cpu" or codes.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(codes))
    if low < qmin or high > qmax:
        raise ValueError(f"{name} must be in [{qmin}, {qmax}], got [{low}, {high}]")


def nibble_values(name: str, codes: torch.Tensor) -> None:
    """All in [-8, 7] or all in [0, 15], on a CPU. Elsewhere a value is not read."""
    if codes.device.type != "cpu" or codes.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(codes))
    if low < -8 or high > (7 if low < 0 else 15):
        raise ValueError(f"{name} must be in [-8, 7] or in [0, 15] to be packed, got [{low}, {high}]")


def packed(name: str, value: Any, count: int, device: torch.device | None = None) -> torch.Tensor:
    """``value`` as ``count`` codes packed two to a byte."""
    tensor(name, value, (torch.uint8,), device)
    if value.shape != ((count + 1) // 2,):
        wanted = f"({(count + 1) // 2},), two codes to a byte"
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(value.shape)}")
    return value


def packed_range(name: str, qmin: int, qmax: int) -> None:
    """A range that nibbles hold: inside [-8, 7] or [0, 15]."""
    if qmin < -8 or qmax > (7 if qmin < 0 else 15):
        raise ValueError(f"{name} must be inside [-8, 7] or [0, 15] for packed codes, got [{qmin}, {qmax}]")


def mixing_weights(weights: Any, count: int, extrapolate: bool = False, any_sum: bool = False) -> tuple[float, ...]:
    """``weights`` as ``count`` float32 numbers that sum to 1, or to anything if ``any_sum``; None gives 1/count each.

    They must be in [0, 1], unless ``extrapolate`` is true.
    """
    if weights is None:
        return (float(np.float32(1 / count)),) * count
    if isinstance(weights, Mapping | str) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be numbers, one for each model, got {type(weights).__name__}")
    weights = list(weights)
    if len(weights) != count:
        raise ValueError(f"weights must be as many as the models, {count}, got {len(weights)}")
    bounds = () if extrapolate else (0.0, 1.0)
    values = [real(f"weights[{k}]", w, *bounds) for k, w in enumerate(weights)]
    if abs(sum(values) - 1) > 1e-6 and not any_sum:
        way_out = '; rule="requantize" takes any sum' if extrapolate else ""
        raise ValueError(f"weights must sum to 1, got {sum(values):g}{way_out}")
    return tuple(float(np.float32(w)) for w in values)


def same_shape(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both have one shape."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names whose values are not the same in both, in order; one without a name has None there."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def listed(items: Iterable[str]) -> str:
    """At most ten names for a message, and how many more there are."""
    items = list(items)
    return "; ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def plain(text: str) -> str:
    """A text on one line, every control character as an escape: a hostile file's names must not steer the terminal."""
    joined = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in joined)


def whole(x: torch.Tensor) -> bool:
    """Whether a tensor holds neither real nor complex numbers, but integers or bools."""
    return not (x.is_floating_point() or x.is_complex())


def short_reason(error: BaseException) -> str:
    """What another library's error says, on one line and not without end."""
    return " ".join(str(error).split())[:300]


def short(dtype: torch.dtype | torch.layout) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
