"""The units of reconstruction: which modules of a model are learned together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from hdrq import checks
from hdrq.prepare.attention import Attention
from hdrq.prepare.observe import observe
from hdrq.quantizers.layers import weighted_layers

TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def find_blocks(model: nn.Module, run, names: Sequence[str] | None = None) -> list[str]:
    """The units of reconstruction, in execution order, of what ``run(model)`` reaches.

    A block is a module of a class of the model's own (of torch's only a transformer's layer) with at least two weighted
    layers, of which the model has a sequence: a ``ModuleList`` or ``Sequential`` that holds several of the class; where
    there is no such sequence, any module with several of it as children. Of blocks in blocks the inner ones count:
    residual blocks, not stages; and since an attention stands alone in its transformer block, that is the whole
    transformer block. An :class:`hdrq.prepare.attention.Attention` outside every block is a unit by itself, and so is a
    layer.

    Args:
        names: the blocks, by name, instead of those found.

    Raises:
        TypeError: ``names`` is one name.
        ValueError: a name is no module with a weighted layer that is reached, or lies inside another.
    """
    if isinstance(names, str):
        raise TypeError(f"blocks must be a list of names, got {names!r}")
    weighted = weighted_layers(model)
    if "" in weighted and not names:
        return [""]  # the model is one layer
    modules = {n: m for n, m in model.named_modules() if n}
    order: dict[str, None] = {}
    observe(model, run, before=lambda name, module, args, kwargs: order.setdefault(name), names=modules)
    layers = [n for n in order if n in weighted]
    blocks = _sequences(model, order, layers) if names is None else _named(names, order, layers)
    attentions = [n for n in order if isinstance(modules[n], Attention)]
    blocks |= {n for n in attentions if not any(f"{n}.".startswith(f"{b}.") or b.startswith(f"{n}.") for b in blocks)}
    inside = {n for n in layers for block in blocks if n == block or n.startswith(f"{block}.")}
    return [n for n in order if n in blocks or (n in layers and n not in inside)]


def _sequences(model: nn.Module, order: dict[str, None], layers: list[str]) -> set[str]:
    modules = dict(model.named_modules())
    own = [
        n
        for n in order
        if (isinstance(modules[n], TRANSFORMERS) or not type(modules[n]).__module__.startswith("torch."))
        and sum(layer.startswith(f"{n}.") for layer in layers) > 1
    ]
    holders = {n: _holder(n, modules) for n in own}
    for containers in ((nn.ModuleList, nn.Sequential), (nn.Module,)):
        siblings = Counter((holders[n], type(modules[n])) for n in own if isinstance(modules[holders[n]], containers))
        repeated = {kind for (_, kind), count in siblings.items() if count > 1}
        blocks = [n for n in own if type(modules[n]) in repeated]
        if blocks:
            return {n for n in blocks if not any(other.startswith(f"{n}.") for other in blocks)}
    return set()


def _holder(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module that has another as a child, be it in a wrapper of torch's: of its compiler, or DataParallel."""
    holder = name.rpartition(".")[0]
    while holder and _wraps(modules[holder]):
        holder = holder.rpartition(".")[0]
    return holder


def _wraps(module: nn.Module) -> bool:
    plural = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return type(module).__module__.startswith("torch.") and not plural and len(list(module.children())) == 1


def _named(names: Sequence[str], order: dict[str, None], layers: list[str]) -> set[str]:
    for name in names:
        checks.choice("a block", name, tuple(order))
        if not any(n == name or n.startswith(f"{name}.") for n in layers):
            raise ValueError(f"a block must hold a convolution, a linear layer or an embedding, got {name!r}")
        if outer := next((other for other in names if name.startswith(f"{other}.")), None):
            raise ValueError(f"blocks must lie apart, got {name!r} inside {outer!r}")
    return set(names)
