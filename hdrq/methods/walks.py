"""The walks of a run over the units of one model, method after method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import Call
from hdrq.calibrate.replay import without_caches
from hdrq.calibrate.report import RunReport
from hdrq.calibrate.sequential import Method, walk
from hdrq.calibrate.settings import RunSettings
from hdrq.errors import DivergenceError
from hdrq.methods.nearest import round_to_nearest
from hdrq.prepare.float_model import device_of
from hdrq.quantizers.layers import input_quantizers


def walk_all(
    full: nn.Module,
    quantized: nn.Module,
    units: Sequence[str],
    batches: list[Call],
    methods: Sequence[Method],
    settings: RunSettings,
    report: RunReport,
    teachers: Sequence[nn.Module] | None = None,
) -> None:
    """Fit every unit of ``quantized``, in place, by each method in turn, and note in ``report`` how it went.

    Args:
        full, units, batches, teachers: of :func:`hdrq.calibrate.sequential.walk`.

    Raises:
        DivergenceError: a loss is not finite. It holds the model, rounded to nearest from there on.
    """
    folder = None if settings.workdir is None else settings.workdir.path
    store = Cache(device_of(full), settings.cache, settings.cache_bytes, folder, settings.ranks.on_this_host())
    with without_caches(full, quantized, *(teachers or ())), settings.shown() as told:
        try:
            for number, method in enumerate(methods):
                for quantizer in input_quantizers(quantized).values():
                    quantizer.mode = "float" if "activations" not in method.fits else "round"
                walks = (number, len(methods))
                reports, report.losses = walk(
                    *(full, quantized, units, batches, method, store, told),
                    walks=walks,
                    losses=report.losses,
                    teachers=teachers,
                )
                report.blocks += reports
        except DivergenceError as error:
            error.model = round_to_nearest(quantized)
            raise
    report.cache_peak = store.peak
