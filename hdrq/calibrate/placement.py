"""Which activations are quantized where: by blocks, at what they read, or by the layers inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hdrq import tree
from hdrq.checks import listed
from hdrq.prepare.flow import OTHER, Flow, Values
from hdrq.prepare.observe import hooks
from hdrq.quantizers.attach import first_tensor, with_tensor
from hdrq.quantizers.bits import BitWidths, bit_policy, bits_around
from hdrq.quantizers.layers import shared_weights, weighted_layers


@dataclass(frozen=True)
class Placement:
    """What is quantized, at which bits, and by whose quantizer."""

    layers: dict[str, BitWidths | None]  # in execution order; None: in float
    reads: dict[str, int | None]  # module, layers and others: bits of what it reads, by whosever quantizer
    inputs: dict[str, tuple[str, int]]  # module whose input is quantized: the module whose quantizer that is, its bits
    blocks: dict[str, str]  # for each block, where what it reads is quantized: at the "block", or at its "layers"


class _Read(NamedTuple):
    """A tensor that a module read."""

    identity: tuple
    quantizes: bool  # floating point, and no input of the model that stays as it is
    values: Values  # of the quantizers outside the module


@torch.no_grad()
def place_quantizers(
    model: nn.Module,
    run: Callable,
    bits: str | Mapping[str, str],
    mode: str,
    quantize_input: bool,
    blocks: Sequence[str],
    operands: Sequence[str] = (),
) -> Placement:
    """Decide where activations are quantized, so that no value passes two quantizers and no tensor has two.

    Inputs are quantized where they are read, and modules that read one tensor share a quantizer. With ``mode="qdrop"``
    a block quantizes what it reads besides, for all its branches, so that a residual is quantized too, unless

    - a norm reads it first: it is the residual stream of a pre-norm transformer, whose outliers a few bits cannot hold;
    - what it writes to its arguments is read elsewhere, where a quantized copy in their place would not show it;
    - a layer reads its values mixed, in a concatenation with others or averaged, and needs a quantizer for the mixture;
    - a layer that reads its values has other bits, or is kept in float.

    Then the layers inside quantize what they read. A layer that reads nothing but values of one quantizer, through
    operations that keep them (a chunk, a permutation, padding with zeros, max pooling, a ReLU), has no second one.
    ``mode="block"`` knows the second and the last reason alone; with ``"input"`` no block has a quantizer.

    Args:
        run: ``run(model)`` runs the model, which has no quantizers yet, on samples that reach all that is quantized.
        mode: :attr:`hdrq.recipes.Recipe.activation_placement`.
        quantize_input: whether layers and blocks quantize a tensor that the model itself is called with.
        blocks: :func:`hdrq.prepare.units.find_blocks`.
        operands: more modules to quantize the inputs of (:func:`hdrq.prepare.attention.expose_operands`).

    Raises:
        ValueError: no layer is reached, or patterns of ``bits`` give layers that read one tensor different bits.
    """
    weighted = weighted_layers(model)
    inner = [b for b in blocks if b not in weighted]
    placed = [b for b in inner if mode != "input" and not _runs_its_children(model, b)]
    while True:
        reads, normalized, written = _run(model, run, placed, list(weighted), operands, quantize_input)
        layers = {name: weighted[name] for name in reads if name in weighted}
        if not layers:
            raise ValueError("model must run at least one convolution or linear layer on calibration, got none")
        policy = bit_policy(list(layers), bits, shared_weights(layers))
        widths, conflict = _activation_bits(reads, policy, placed)
        served = {name: _served(name, read, widths) for name, read in reads.items()}
        leaving = _misplaced(reads, widths, served, placed, mode) | (normalized if mode == "qdrop" else set())
        leaving |= written.intersection(placed)
        if not leaving:
            break
        placed = [b for b in placed if b not in leaving]
    if conflict and not isinstance(bits, str):
        raise ValueError(
            f"bits must agree where layers read one tensor, got {conflict}; give them one width of activations, or "
            'keep one in "float"'
        )
    inputs: dict[str, tuple[str, int]] = {}
    first_of: dict[tuple, str] = {}
    for name, read in reads.items():
        width = widths[name]
        if width is not None and not served[name]:
            inputs[name] = first_of.setdefault((width, *(r.identity for r in read)), name), width
    return Placement(policy, widths, inputs, {b: "block" if b in inputs else "layers" for b in inner})


def _copies(own: tuple[tuple, dict], replaced: tuple[tuple, dict]) -> list:
    """The arguments of a call that others stand for, apart from tensors."""
    pairs = zip((*own[0], *own[1].values()), (*replaced[0], *replaced[1].values()), strict=True)
    return [new for old, new in pairs if new is not old and not isinstance(new, torch.Tensor)]


def _runs_its_children(model: nn.Module, name: str) -> bool:
    """Whether a module is a container that may call each child in turn: a quantizer among them would be called too."""
    return isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _activation_bits(
    reads: Mapping[str, list[_Read]], policy: Mapping[str, BitWidths | None], placed: Sequence[str]
) -> tuple[dict[str, int | None], str]:
    """The bits of what each module reads, None if it is not quantized; and whose bits differ for one tensor, in words.

    A block's are those of the first layer that reads its values. Where bits differ for one tensor, all have the widest.
    """
    widths: dict[str, int | None] = {}
    for name, read in reads.items():
        own = policy[name] if name in policy else bits_around(name, policy)
        widths[name] = None if own is None or not read[0].quantizes else own.activation
    conflict = _widen(widths, {name: read for name, read in reads.items() if name not in placed})
    given: set[str] = set()
    for name in policy:
        blocks = _sources(reads[name]).intersection(placed) - given if widths[name] is not None else set()
        widths |= dict.fromkeys(blocks, widths[name])
        given |= blocks
    return widths, conflict or _widen(widths, reads)


def _widen(widths: dict[str, int | None], reads: Mapping[str, list[_Read]]) -> str:
    """Give all that read the same the widest of their bits; for one tensor whose bits differed, says whose."""
    readers: dict[tuple, list[str]] = {}
    for name, read in reads.items():
        readers.setdefault(tuple(r.identity for r in read), []).append(name)
    conflict = ""
    for names in readers.values():
        own = {name: width for name in names if (width := widths[name]) is not None}
        if len(set(own.values())) > 1:
            conflict = conflict or listed(f"A{width} for {name!r}" for name, width in own.items())
            widths |= dict.fromkeys(own, max(own.values()))
    return conflict


def _sources(read: Iterable[_Read]) -> frozenset[str]:
    return frozenset().union(*(r.values.sources for r in read))


def _served(name: str, read: list[_Read], widths: Mapping[str, int | None]) -> bool:
    """Whether all that a module reads is on the grid of another quantizer of its bits."""
    one_each = all(r.values.whole and len(r.values.sources) == 1 for r in read)
    return one_each and all(widths[source] == widths[name] for source in _sources(read))


def _misplaced(
    reads: Mapping[str, list[_Read]],
    widths: Mapping[str, int | None],
    served: Mapping[str, bool],
    placed: Sequence[str],
    mode: str,
) -> set[str]:
    """The blocks that are to have no quantizer, because of what reads its values."""
    leaving: set[str] = set()
    for name, read in reads.items():
        sources = _sources(read)
        other_bits = any(widths[source] != widths[name] for source in sources)
        if not served[name] and (mode != "block" or other_bits):
            leaving |= sources.intersection(placed)
    return leaving


def _run(
    model: nn.Module,
    run: Callable,
    blocks: Sequence[str],
    layers: Sequence[str],
    operands: Sequence[str],
    quantize_input: bool,
) -> tuple[dict[str, list[_Read]], set[str], set[str]]:
    """What modules read at each of their calls, in execution order, as if blocks and operands quantized their inputs;
    the blocks whose input a norm reads first; and those that write to their arguments what is read elsewhere.
    """
    reads: dict[str, list[_Read]] = {}
    flow = Flow()
    unquantized: set[tuple] = set()
    written: set[str] = set()
    entered: list[tuple] = []  # what the blocks that run were called with

    def called(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not quantize_input:
            unquantized.update(flow.identity(x) for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor))

    def quantizes(x: torch.Tensor) -> bool:
        return x.is_floating_point() and flow.identity(x) not in unquantized

    def see(name: str, x: torch.Tensor) -> None:
        reads.setdefault(name, []).append(_Read(flow.identity(x), quantizes(x), flow.values(x)))

    def enter(name: str, is_layer: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if isinstance(module, nn.Embedding) and not any(isinstance(x, torch.Tensor) for x in args):
                reads.setdefault(name, []).append(_Read((name,), False, OTHER))
                return None
            x = first_tensor(args, kwargs, name)
            see(name, x)
            if is_layer or not quantizes(x):
                return None
            quantized = x.clone()
            flow.mark(quantized, name)
            replaced = with_tensor(args, kwargs, x, quantized)
            if name in blocks:
                flow.enter(name, quantized)
                copies = _copies((args, kwargs), replaced)  # of containers that hold the tensor
                entered.append((x, quantized, flow.identity(quantized), copies, tree.leaves(copies)))
            return replaced

        return hook

    def leave(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            flow.leave()
            if entered:
                x, quantized, identity, copies, before = entered.pop()
                if flow.identity(quantized) != identity:
                    flow.stale(x, name)
                after = tree.leaves(copies)
                if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
                    written.add(name)

        return hook

    def norm(module: nn.Module, args: tuple, kwargs: dict) -> None:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor):
                flow.norm(x)

    handles = [model.register_forward_pre_hook(called, with_kwargs=True, prepend=True)]
    names = dict.fromkeys([*blocks, *layers, *operands])
    for name in names:
        module = model.get_submodule(name)
        hook = enter(name, name in layers)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if name in blocks:
            handles.append(module.register_forward_hook(leave(name)))
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and not any(n == name or n.startswith(f"{name}.") for n in names):
            handles.append(module.register_forward_pre_hook(norm, with_kwargs=True))
    with hooks(handles), flow:
        run(model)
    return reads, flow.normalized, written | flow.stale_reads
