"""How quantizers are written for a runtime: which integers it has kernels for, and what it cannot hold."""

from __future__ import annotations

from dataclasses import dataclass

from hdrq import checks


@dataclass(frozen=True)
class Profile:
    """The forms that a runtime computes in integers.

    Attributes:
        name: of the runtime, or "standard" for files that others read.
        weights_widened: weights are int8 ``codes·2^k`` with the scale ``s/2^k``, the same values to the bit.
        smallest_types: 4 bits and less are int4 and uint4.
        zero_points: whether an activation may have one.
        package: what the runtime is installed by.
    """

    name: str
    weights_widened: bool = True
    smallest_types: bool = False
    zero_points: bool = True
    package: str | None = None


PROFILES = {
    "openvino": Profile("openvino", package="openvino"),
    "onnxruntime": Profile("onnxruntime", package="onnxruntime"),
    "tensorrt": Profile("tensorrt", zero_points=False),
    "standard": Profile("standard", weights_widened=False, smallest_types=True),
}
WIDENED = 64  # of int8: a pair of its products with uint8 fits 16 bits, in which processors without VNNI add them


def profile(runtime: str) -> Profile:
    """The profile of a runtime.

    Raises:
        ValueError: there is none of that name.
    """
    return PROFILES[checks.choice("runtime", runtime, tuple(PROFILES))]


@dataclass(frozen=True)
class IntegerType:
    """An integer type of ONNX, and what it holds."""

    name: str
    low: int
    high: int


TYPES = {
    name: IntegerType(name, low, high)
    for name, low, high in (
        ("UINT4", 0, 15),
        ("INT4", -8, 7),
        ("UINT8", 0, 255),
        ("INT8", -128, 127),
        ("UINT16", 0, 2**16 - 1),
        ("INT16", -(2**15), 2**15 - 1),
    )
}


@dataclass(frozen=True)
class ActivationForm:
    """An activation's range in an ONNX type: integers are ``q + zero_point``, clipped where the type is wider."""

    type: IntegerType
    zero_point: int
    low: int
    high: int

    @property
    def clipped(self) -> bool:
        return (self.low, self.high) != (self.type.low, self.type.high)


def activation_form(profile: Profile, layer: str, qmin: int, qmax: int) -> ActivationForm:
    """The type, zero point and clip of an activation's range.

    Raises:
        ValueError: no type of the profile holds the range.
    """
    levels = qmax - qmin + 1
    if not profile.zero_points:
        if qmin >= -128 and qmax <= 127:
            return ActivationForm(TYPES["INT8"], 0, qmin, qmax)
        raise ValueError(
            f"ranges must lie in [-128, 127] for {profile.name}, which has no zero point, got [{qmin}, {qmax}] for the "
            f"input of {layer}"
        )
    four = profile.smallest_types and levels == 16  # ONNX has no Clip of four bits
    names = ("UINT4", "UINT8", "UINT16") if four and qmin <= 0 <= qmax else ("UINT8", "UINT16")
    for kind in (TYPES[name] for name in names):
        zero_point = min(max(-qmin, 0), kind.high)
        if levels <= kind.high + 1 and qmin + zero_point >= 0 and qmax + zero_point <= kind.high:
            return ActivationForm(kind, zero_point, qmin + zero_point, qmax + zero_point)
    raise ValueError(f"ranges must fit 16 bits with 0 inside or near, got [{qmin}, {qmax}] for the input of {layer}")
