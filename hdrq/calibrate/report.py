"""What a run found, as data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import nn

from hdrq.prepare.coverage import Coverage

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class LayerReport:
    """What became of a weight that was fitted in closed form; "" says nothing went another way than asked for.

    Errors are the objective's values: of outputs, weighted by tasks, and of the anchor. ``nearest`` is that of the
    weight that was given, rounded to nearest on the grid that it came with; ``best`` that of the weight before it was
    rounded; ``error`` that of the result.
    """

    name: str
    nearest: float = 0.0
    best: float = 0.0
    error: float = 0.0
    unexcited: int = 0  # directions of its inputs that no sample has: nothing says what they should be
    note: str = ""


@dataclass(frozen=True)
class BlockReport:
    """One block: its reconstruction loss on some calibration samples, evenly spaced, and the seconds it took."""

    name: str
    loss_before: float  # rounded to nearest, its inputs quantized
    loss_after: float
    seconds: float
    layers: tuple[LayerReport, ...] = ()  # of a method in closed form


@dataclass
class RunReport:
    """How a model was quantized.

    ``errors`` are ``‖y_q − y‖² / ‖y‖²`` of each block's output y, and of the model's (``"output"``), on data held out,
    what comes before being quantized too; ``nearest`` is the same for rounding to nearest, before anything was learned.
    """

    recipe: str
    blocks: list[BlockReport] = field(default_factory=list)
    losses: list[tuple[str, int, float]] = field(default_factory=list)  # block, iteration, reconstruction loss
    errors: dict[str, float] = field(default_factory=dict)
    nearest: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: dict[str, int] = field(default_factory=dict)  # bytes, of the process and of the device
    attention: dict[str, list[str]] = field(default_factory=dict)  # quantized operands: q, k, v, softmax
    placement: dict[str, str] = field(
        default_factory=dict
    )  # of blocks: their input is quantized at "block" or "layers"
    coverage: Coverage | None = None  # what share of the model is quantized
    cache_peak: dict[str, int] = field(default_factory=dict)  # bytes of blocks' inputs and targets, for each tier


def report_of(model: nn.Module) -> RunReport:
    """The report of the run that made a model.

    Raises:
        ValueError: the model was not made by :func:`hdrq.quantize` in this process.
    """
    report = model.__dict__.get("hdrq_report")
    if report is None:
        raise ValueError("model must be the result of hdrq.quantize, got one without a report")
    return report


def set_report(model: nn.Module, report: RunReport) -> None:
    """Keep a report with the model that it is about."""
    model.__dict__["hdrq_report"] = report


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that this process held so far, on the host and on a CUDA device.

    ``"host"`` is left out where Python has no ``resource``, as on Windows.
    """
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
