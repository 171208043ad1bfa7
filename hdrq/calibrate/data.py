"""Calibration data: checked, and as calls of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hdrq.checkpoint.workdir import state_hash

SPLIT = 256  # samples of a batch where one tensor is given


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model: every tensor has the samples along its first axis."""

    args: tuple
    kwargs: Mapping

    def __call__(self, module: nn.Module):
        return module(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]

    @property
    def size(self) -> int:
        """How many samples."""
        return len(self.tensors[0])

    def at(self, index: torch.Tensor) -> Call:
        """The call with the samples at ``index``."""

        def pick(value):
            return value[index.to(value.device)] if isinstance(value, torch.Tensor) else value

        return Call(tuple(map(pick, self.args)), {key: pick(value) for key, value in self.kwargs.items()})


def calibration_calls(data, name: str = "calibration") -> list[Call]:
    """Data as calls of the model: a tensor, or an iterable of batches, each a tensor, a tuple or a dict of arguments.

    Raises:
        TypeError, ValueError: no sample, a batch without a tensor, NaN or infinity, or shapes that vary.
    """
    if isinstance(data, torch.Tensor):
        data = data.split(SPLIT) if data.ndim else [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"{name} must be a tensor or an iterable of batches, got {type(data).__name__}")
    calls: list[Call] = []
    for batch in data:
        if isinstance(batch, Mapping):
            call = Call((), dict(batch))
        else:
            call = Call(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})
        if not call.tensors or any(t.is_floating_point() and not t.isfinite().all() for t in call.tensors):
            what = "a batch without a tensor" if not call.tensors else "NaN or infinity"
            raise ValueError(f"{name} must be batches of finite tensors, got {what} in batch {len(calls)}")
        if any(t.ndim == 0 for t in call.tensors):
            raise ValueError(f"{name} must have samples along the first axis, got a scalar in batch {len(calls)}")
        if call.size == 0:
            continue
        calls.append(call)
        first, shapes = ([tuple(t.shape[1:]) for t in c.tensors] for c in (calls[0], call))
        if shapes != first:
            raise ValueError(
                f"{name} must have samples of one shape, got {first} and, in batch {len(calls) - 1}, {shapes}"
            )
    if not calls:
        raise ValueError(f"{name} must have at least one sample, got none")
    if sum(call.size for call in calls) == 1:
        warnings.warn(f"{name} has one sample: what is learned from it holds for little else", stacklevel=4)
    return calls


def data_hash(batches: list[Call]) -> str:
    """A fingerprint of calibration data: its tensors, its other arguments, and how it is cut into batches."""
    sizes = [call.size for call in batches]
    tensors = [t for call in batches for t in call.tensors]
    plain = [repr(v) for c in batches for v in (*c.args, *c.kwargs.items()) if not isinstance(v, torch.Tensor)]
    return state_hash({str(i): t for i, t in enumerate(tensors)}, repr(sizes) + "".join(plain))


def first_samples(batches: list[Call], count: int) -> list[Call]:
    """The calls that hold the first ``count`` samples."""
    calls: list[Call] = []
    for call in batches:
        calls.append(call.at(torch.arange(min(call.size, count))))
        count -= call.size
        if count <= 0:
            break
    return calls


def spans(batches: list[Call]) -> Iterator[tuple[int, int]]:
    """Where each batch lies among all samples: its first, and the one after its last."""
    start = 0
    for call in batches:
        yield start, start + call.size
        start += call.size


def run_all(batches: list[Call]) -> Callable:
    """A function that runs a model on all batches, and returns the outputs."""

    @torch.no_grad()
    def run(model: nn.Module) -> list:
        return [call(model) for call in batches]

    return run
