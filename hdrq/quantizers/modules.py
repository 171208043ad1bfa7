"""Weight and activation quantizers: modules that hold a scale, a range and a mode, and leave the maths to the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.backends.eager import per_element
from hdrq.rng import rng_state

WIDEST = (-(2**15), 2**15 - 1)  # the widest range of integers
MODES = ("float", "noise", "round")  # pass through; noise in place of rounding; fake-quantize
COUNTS = ("tensor", "channel", "sample")  # whose elements LSQ's factor counts: all, those of one scale, of one sample


def mean_range(
    weights: Sequence[float], scales: Sequence[float], ranges: Sequence[Sequence[int]], levels: int
) -> tuple[int, int]:
    """Where the mean of quantizers has its range of integers: ``low* = round(Σ λ_k·s_k·low_k / s*)``.

    Its ``levels`` L have the step ``s* = Σ λ_k·s_k·L_k / L``. A range with a zero point inside is
    ``[−z, 2^b − 1 − z]``; equal ranges stay.

    Raises:
        ValueError: the mean scale is not positive.
    """
    steps = [w * s for w, s in zip(weights, scales, strict=True)]
    if not 0 < sum(steps) < math.inf:
        raise ValueError(f"the mean scale of an input must be positive and finite, got {sum(steps):g}")
    mean_step = sum(step * ((high - low + 1) / levels) for step, (low, high) in zip(steps, ranges, strict=True))
    low = round(sum(step * each[0] for step, each in zip(steps, ranges, strict=True)) / mean_step)
    return low, low + levels - 1


class Quantizer(nn.Module):
    """A scale, learned with LSQ's gradient factor, an integer range, and the random stream of its noise.

    Args:
        scale: float32, one element, one for each index of ``axis``, or one for each group, ``(…, last / group_size)``.
        qmin, qmax: the integer range.
        axis: the axis along which ``scale`` varies; None for one scale.
        zero_point: integers in float32, as many as scales; None for 0.
        group_size: neighbours along the last axis that share a scale; None for no groups.
    """

    keep = 1.0  # the probability that an element is quantized
    gradient = "round-first"  # of hdrq.ops.fake_quantize
    counts = "tensor"  # one of COUNTS
    zero_point: torch.Tensor | None
    floor: torch.Tensor | None  # what the scale is raised to before it is used, where an optimizer may go below it

    def __init__(
        self,
        scale: torch.Tensor,
        qmin: int,
        qmax: int,
        axis: int | None = None,
        zero_point: torch.Tensor | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        checks.quant_range(qmin, qmax)
        self.scale = nn.Parameter(scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("floor", None, persistent=False)
        self.qmin, self.qmax, self.axis, self.group_size = qmin, qmax, axis, group_size
        self.mode = "round"
        self.noise = "uniform"
        self.rng = rng_state(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        checks.choice("mode", self.mode, MODES)
        if self.mode == "float":
            return x
        self.raise_scale()
        grid = (x, self.scale, self.qmin, self.qmax)
        where: Any = {**self.where, "grad_scale": self._gradient_factor(x), "keep": self.keep}
        if self.mode == "noise":
            return ops.noise_quantize(*grid, self.rng, noise=self.noise, **where)
        rng = self.rng if self.keep < 1 else None  # it lies where a learner put it, not where the module went
        return ops.fake_quantize(*grid, zero_point=self.zero_point, rng=rng, gradient=self.gradient, **where)

    def raise_scale(self) -> None:
        """Raise the scale to its floor, in place. Where that changes it, no backward pass waits for what it was."""
        if self.floor is not None:
            self.scale.data.clamp_(min=self.floor)

    @property
    def where(self) -> dict[str, Any]:
        """Along what scales vary, as ops take it."""
        return {"axis": self.axis, "group_size": self.group_size}

    def broadcast(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One number for each scale, in a shape that broadcasts over ``x``."""
        if self.group_size is None:
            return per_element(values, x.ndim, checks.axis_of(x, self.axis))
        return values.reshape(*x.shape[:-1], x.shape[-1] // self.group_size).repeat_interleave(self.group_size, -1)

    def _gradient_factor(self, x: torch.Tensor) -> float:
        """LSQ's ``1/sqrt(n·Q_P)``; 1 where no gradient reaches the scale, so that a compiler sees no size there."""
        if not (self.scale.requires_grad and torch.is_grad_enabled()):
            return 1.0
        count = x.numel()
        if self.counts != "tensor":
            count //= self.scale.numel() if self.counts == "channel" else max(len(x), 1) if x.ndim else 1
        largest = self.qmax if self.qmin >= -self.qmax - 1 else -self.qmin  # Q_P; of a range with a zero point
        return 1 / math.sqrt(max(count, 1) * largest)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that ``x`` rounds to."""
        return ops.quantize(x, self.scale, self.qmin, self.qmax, zero_point=self.zero_point, **self.where)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What integers stand for."""
        return ops.dequantize(codes, self.scale, zero_point=self.zero_point, **self.where)

    def _apply(self, *args, **kwargs):
        """As modules move and change their type; scale and zero point stay float32, to the bit, as ops ask for."""
        held = [tensor.data for tensor in (self.scale, self.zero_point) if tensor is not None]
        super()._apply(*args, **kwargs)
        for tensor, before in zip((self.scale, self.zero_point), held, strict=False):
            if tensor is not None and tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        return self

    def get_extra_state(self) -> torch.Tensor:
        """What a state dict holds beside the scale: ``qmin``, ``qmax``, and the axis, or −1 and the size of groups.

        It is a tensor, so that any format of state dicts takes it. Files of :func:`hdrq.save` have it in the manifest.
        """
        varies = [self.axis] if self.group_size is None else [-1, self.group_size]
        facts = [self.qmin, self.qmax, *(number for number in varies if number is not None)]
        return torch.tensor(facts, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the range and the axis of a state dict: a scale means nothing without them.

        Raises:
            TypeError, ValueError: it is not what :meth:`get_extra_state` returns.
        """
        if not isinstance(state, torch.Tensor) or state.numel() not in (2, 3, 4) or state.is_floating_point():
            forms = "[qmin, qmax], [qmin, qmax, axis] or [qmin, qmax, -1, group_size]"
            raise ValueError(f"extra state must be the tensor {forms}, got {state}")
        qmin, qmax, *varies = (int(number) for number in state.flatten().tolist())
        checks.quant_range(qmin, qmax)
        self.qmin, self.qmax = qmin, qmax
        self.axis = varies[0] if len(varies) == 1 else None
        self.group_size = varies[1] if len(varies) == 2 else None

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """As torch loads a module's own part, an error of which says whose part it is."""
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state of {prefix.rstrip('.') or 'the quantizer'}: {error}") from error

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"range=[{self.qmin}, {self.qmax}], axis={self.axis}{groups}, mode={self.mode}"


class WeightQuantizer(Quantizer):
    """The parametrization of a layer's weight (:mod:`torch.nn.utils.parametrize`).

    ``alpha`` and ``beta`` are there while AdaRound is learned. ``dtype`` is the weight's, where what is learned has a
    finer one.
    Inside :func:`substituted` it returns a weight that was quantized elsewhere, together with those of other layers.

    A finished quantizer, in evaluation mode and with gradients off, keeps the quantized weight for its next calls. It
    does so until the latent weight, the scale or the range is another, or was changed in place: through ``.data``
    alone torch does not say so, so write into the tensors themselves under ``torch.no_grad()``. A weight that lies on
    its grid is kept as it is and takes no memory. What is kept is in no state dict and in no copy.
    """

    dtype: torch.dtype | None = None
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    substitute: torch.Tensor | None = None
    _kept: _Kept | None = None

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        if self._finished and _keepable(w) and _keepable(self.scale):
            return self._kept_weight(w)
        y = self.substitute if self.substitute is not None else super().forward(w)
        return y if self.dtype is None else y.to(self.dtype)

    def adaround(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight rounded up or down as ``alpha`` says, softly, and the rounding loss for the exponent ``beta``."""
        grid = (w, self.scale, cast(torch.Tensor, self.alpha), *self._rounding_range)
        y, penalty = ops.adaround_regularized(*grid, cast(torch.Tensor, self.beta), **self.where)
        return self._clamped(y), penalty

    def rounded(self, w: torch.Tensor) -> torch.Tensor:
        """The weight on its grid for good: rounded up or down as ``alpha`` says, or to the nearest point."""
        if self.alpha is not None:
            w = ops.adaround(w, self.scale, self.alpha, *self._rounding_range, hard=True, **self.where)
        return self.values(self.codes(w))

    @property
    def _rounding_range(self) -> tuple[int, int]:
        """The range for :func:`hdrq.ops.adaround`: it knows no zero point, with which :meth:`_clamped` clamps."""
        return (self.qmin, self.qmax) if self.zero_point is None else WIDEST

    def _clamped(self, y: torch.Tensor) -> torch.Tensor:
        if self.zero_point is None:
            return y
        shift, scale = (self.broadcast(t.detach(), y) for t in (self.zero_point, self.scale))
        return torch.clamp(y, (self.qmin - shift) * scale, (self.qmax - shift) * scale)

    @property
    def _finished(self) -> bool:
        """Whether a call depends on the latent weight, the scale and the range alone, and nobody asks for gradients."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        learned = self.scale.requires_grad or self.dtype is not None or self.alpha is not None
        return not learned and self.substitute is None and self.mode == "round" and self.keep == 1

    def _kept_weight(self, w: torch.Tensor) -> torch.Tensor:
        """The quantized weight, computed anew only where something that it depends on is another."""
        grid = (self.qmin, self.qmax, self.axis, self.group_size)
        kept, given = self._kept, [w, self.scale, *([] if self.zero_point is None else [self.zero_point])]
        if kept is None or kept.grid != grid or kept.state != _state(*given, kept.weight):
            with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode would serve nothing else
                weight = super().forward(w)
                weight = w.detach() if _same_bits(weight, w) else weight
                sources = [t.detach() for t in given]  # while they live, no other tensor has their addresses
            kept = self._kept = _Kept(weight, sources, _state(*given, weight), grid)
        return kept.weight

    def _apply(self, *args, **kwargs):
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


class _Kept(NamedTuple):
    """A quantized weight, what it was computed from, and how that is known again."""

    weight: torch.Tensor
    sources: list[torch.Tensor]
    state: tuple
    grid: tuple[int | None, ...]


def _keepable(x: torch.Tensor) -> bool:
    """Whether a change of a tensor can be seen: it is a plain one in memory, with a version, and nothing records it."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.is_inference() or x.device.type not in ("cpu", "cuda"):
        return False
    recorded = torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not recorded and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _state(*tensors: torch.Tensor) -> tuple:
    """What is another as soon as a tensor is, or as it is changed in place."""
    return tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are alike to the last bit, signs of zeros too, and lie in memory alike."""
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


@contextmanager
def substituted(quantizers: Sequence[WeightQuantizer], weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the block, each quantizer returns the quantized weight that is given for it.

    A weight is cast to a half type here, once for all that read it. ``parametrize.cached`` would do so too, for all
    threads of the process, of which another may be learning another model.
    """
    for quantizer, weight in zip(quantizers, weights, strict=True):
        quantizer.substitute = weight if quantizer.dtype is None else weight.to(quantizer.dtype)
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.substitute = None


class ActivationQuantizer(Quantizer):
    """The quantizer of a layer's input. While a block is reconstructed it leaves each element as it is with
    probability ``1 − keep`` (QDrop, Wei et al., ICLR 2022); the mask draws from the stream of the noise.
    """

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside the block, everything passes as it is."""
        mode, self.mode = self.mode, "float"
        try:
            yield
        finally:
            self.mode = mode
