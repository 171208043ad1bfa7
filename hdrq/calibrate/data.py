"""Calibration data: checked, and as calls of a model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hdrq import checks, tree
from hdrq.checkpoint.workdir import state_hash

SAMPLES, BYTES = 2**14, 2**33  # read, at most, past the length that an iterable says it has
SPLIT = 256  # samples of a batch where one tensor is given


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model: tensors have the samples along their first axis.

    They may lie in lists, tuples, dicts and dataclasses. A tensor of one row or without axes belongs to every sample.
    """

    args: tuple
    kwargs: Mapping

    def __call__(self, module: nn.Module):
        """What the module returns for copies of the tensors, where its parameters are: a forward may write to them."""
        device = next((p.device for p in module.parameters()), None)
        call = self.map(lambda x: x.to(device or x.device, copy=True))
        return module(*call.args, **call.kwargs)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The call with its tensors changed, in containers of its own."""
        leaves, spec = tree.flatten((self.args, dict(self.kwargs)))
        changed = [change(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        return Call(*tree.unflatten(changed, spec))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in tree.leaves((self.args, dict(self.kwargs))) if isinstance(x, torch.Tensor)]

    def __str__(self) -> str:
        def form(value) -> str:
            if isinstance(value, torch.Tensor):
                return f"{tuple(value.shape)} {checks.short(value.dtype)}"
            inside = [x for x in tree.leaves(value) if isinstance(x, torch.Tensor)]
            return type(value).__name__ + (f" of {', '.join(map(form, inside))}" if inside else "")

        return ", ".join([*map(form, self.args), *(f"{key}={form(value)}" for key, value in self.kwargs.items())])

    @property
    def size(self) -> int:
        """How many samples: the longest first axis."""
        return max((len(t) for t in self.tensors if t.ndim), default=0)

    def at(self, index: torch.Tensor) -> Call:
        """The call with the samples at ``index``; a tensor of one row or without axes belongs to all samples."""
        size = self.size

        def pick(value: torch.Tensor) -> torch.Tensor:
            return value if value.ndim == 0 or (len(value) == 1 and size > 1) else value[index.to(value.device)]

        return self.map(pick)

    def check_kinds(self, where: str) -> None:
        """Refuse tensors that are not dense, and those that no container of the tree holds."""
        for value in tree.leaves((self.args, dict(self.kwargs))):
            if isinstance(value, torch.Tensor) and (value.is_nested or value.layout != torch.strided):
                form = "a nested one" if value.is_nested else f"one of layout {checks.short(value.layout)}"
                raise TypeError(f"{where} must have dense tensors, got {form}")
            if not isinstance(value, torch.Tensor) and tree.hides_tensors(value):
                raise TypeError(
                    f"{where} must have tensors in lists, tuples, dicts or dataclasses, got a {type(value).__name__} "
                    "that holds some"
                )

    def check_lengths(self, where: str) -> None:
        """Refuse a call in which some tensor has neither one row nor as many rows as the longest tensor."""
        size = self.size
        for name, value in (*((f"argument {k}", v) for k, v in enumerate(self.args)), *self.kwargs.items()):
            tensors = [x for x in tree.leaves(value) if isinstance(x, torch.Tensor)]
            if wrong := [len(x) for x in tensors if x.ndim and len(x) not in (1, size)]:
                raise ValueError(
                    f"{where} must have tensors of one length along the first axis, or of one row for all samples, "
                    f"got {wrong[0]} in {name} and {size} in another"
                )


def calibration_calls(data, name: str = "calibration") -> list[Call]:
    """Data as calls of the model: a tensor, or an iterable of batches, each a tensor, a tuple or a dict of arguments.

    An argument may be a list, a tuple or a dict of tensors: ``({"image": x},)`` is a batch for a model of one dict.

    Raises:
        TypeError, ValueError: no sample, a batch without a tensor, one that is sparse or nested, NaN or infinity, or
            shapes that vary.
    """
    if isinstance(data, torch.Tensor):
        data = data.split(SPLIT) if data.ndim else [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"{name} must be a tensor or an iterable of batches, got {type(data).__name__}")
    calls: list[Call] = []
    try:
        length = len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        length = 0
    samples = held = 0
    for read, batch in enumerate(data):
        if read >= length and (max(samples, read) >= SAMPLES or held > BYTES):
            raise ValueError(
                f"{name} must end, or say its length, got {samples:,} samples in {read:,} batches and still more; cut "
                "an endless loader with itertools.islice(loader, batches), or give a list"
            )
        if isinstance(batch, Mapping):
            call = Call((), dict(batch))
        else:
            call = Call(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})
        call.check_kinds(f"batch {read} of {name}")
        if not call.tensors or any(t.is_floating_point() and not t.isfinite().all() for t in call.tensors):
            what = "a batch without a tensor" if not call.tensors else "NaN or infinity"
            raise ValueError(f"{name} must be batches of finite tensors, got {what} in batch {read}")
        if all(t.ndim == 0 for t in call.tensors):
            raise ValueError(f"{name} must have samples along the first axis, got a scalar in batch {read}")
        call.check_lengths(f"batch {read} of {name}")
        if call.size == 0:
            continue
        calls.append(call)
        samples += call.size
        held += sum(t.nbytes for t in call.tensors)
        first, shapes = ([tuple(t.shape[1:]) for t in c.tensors] for c in (calls[0], call))
        if shapes != first:
            raise ValueError(f"{name} must have samples of one shape, got {first} and, in batch {read}, {shapes}")
    if not calls:
        raise ValueError(f"{name} must have at least one sample, got none")
    if name != "held_out" and sum(call.size for call in calls) == 1:
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


def run_all(batches: list[Call], what: str = "") -> Callable:
    """A function that runs a model on all batches, and returns the outputs.

    Args:
        what: begins the message about an error that the model raises when it is run for the first time, such as
            ``"model must run on calibration"``; the data's shapes follow. Empty: the error is the model's own.
    """
    tried = not what

    @torch.no_grad()
    def run(model: nn.Module) -> list:
        nonlocal tried
        first, tried = not tried, True
        outputs = []
        for call in batches:
            try:
                outputs.append(call(model))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if not first:
                    raise
                reason = " ".join(str(error).split())[:500]
                raise ValueError(f"{what}, got {type(error).__name__} from model({call}): {reason}") from error
        return outputs

    return run


def check_call(model: nn.Module, call: Call, name: str = "calibration") -> None:
    """Refuse arguments that the model's ``forward`` does not take: a loader of images and labels gives two.

    Raises:
        TypeError: names what a batch is.
    """
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except ValueError:
        return  # its signature is not known
    except TypeError as error:
        got = ", ".join([*(type(v).__name__ for v in call.args), *(f"{key}=" for key in call.kwargs)])
        raise TypeError(
            f"{name} must be batches of the model's arguments, got model({got}), {error}; "
            "a loader of (image, label) must give the images alone"
        ) from error


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most ``limit`` of ``count``, evenly over all."""
    wanted = count if limit is None else min(limit, count)
    return [i * count // wanted for i in range(wanted)]
