"""A model made ready for quantization: everything that is decided before a scale is searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hdrq.prepare.attention import expose_operands
from hdrq.prepare.copying import copy_model
from hdrq.prepare.float_model import prepare_float
from hdrq.prepare.offload import Offload
from hdrq.prepare.uncalled import refuse_uncalled
from hdrq.prepare.units import find_blocks


@dataclass(frozen=True)
class Prepared:
    """What quantization starts from."""

    full: nn.Module  # in full precision: BatchNorm folded, packed attentions replaced
    quantized: nn.Module  # a copy of it, to be given quantizers
    folded: dict[str, str]  # the BatchNorms that were folded, each with its layer
    units: list[str]  # the units of reconstruction, in forward order
    operands: list[str]  # modules, besides layers, whose inputs are quantized: operands of attentions


def prepare(
    model: nn.Module,
    run_batch: Callable,
    run_sample: Callable,
    bits: str | Mapping[str, str],
    *,
    blocks: Sequence[str] | None = None,
    attention: bool = True,
    fold: bool = True,
    offload: Offload | None = None,
) -> Prepared:
    """Fold, open attentions, find units, and refuse what would silently stay in float. The model is left as it is.

    Args:
        run_batch: runs a model on a batch; folding is checked on its outputs.
        run_sample: runs a model on one sample, which says what is called, and in which order.
        bits: patterns of it may keep a layer in float (:func:`hdrq.quantizers.bits.bit_policy`).
        blocks: the names of the units; None finds them.
        attention: whether the operands of attentions are to be quantized.
        fold: whether BatchNorm is folded.
        offload: where the weights of both copies lie; None for memory.

    Raises:
        ValueError: folding or replacing changed the outputs, or a weight is read without a call of its layer.
    """
    full, folded = prepare_float(model, run_batch, fold=fold, offload=offload)
    quantized = copy_model("model", full, offload)
    units = find_blocks(full, run_sample, blocks)
    refuse_uncalled(quantized, run_sample, bits, model)
    operands = expose_operands(quantized, run_sample) if attention else []
    return Prepared(full, quantized, folded, units, operands)
