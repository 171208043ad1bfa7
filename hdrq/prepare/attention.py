"""Attention: its matrix products' operands, q, k, v and the softmax, where a quantizer can be put on them.

``nn.MultiheadAttention`` is replaced by :class:`Attention`: its projections are layers and its operands modules. Other
attentions keep their code. Of those whose structure is known, the modules that return an operand hand it on through an
:class:`Operand`: the layers that project to q, k and v (or the norms after them), and the dropout or the softmax that
is a module. A softmax inside a function, such as ``F.scaled_dot_product_attention``, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hdrq import checks
from hdrq.prepare.folding import check_unchanged
from hdrq.prepare.observe import observe
from hdrq.prepare.precision import full_precision
from hdrq.quantizers.layers import input_readers

SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("q", "k", "v"))
JOINT = (  # a layer for q, and one for k and v
    ("q", "kv"),
    ("to_q", "to_kv"),
    ("q_proj", "kv_proj"),
    ("query", "key_value"),
    ("q_linear", "kv_linear"),
    ("Wq", "Wkv"),
)
SOFTMAX = (nn.Softmax, nn.Dropout, nn.Identity)  # what may return a softmax; whether it does, a run says


class Operand(nn.Identity):
    """An operand of a matrix product; its quantizer is that of its input."""


class Attention(nn.Module):
    """``softmax(q·kᵀ/√d + mask)·v`` with the weights and the signature of an ``nn.MultiheadAttention``.

    Its projections ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are ``nn.Linear``; ``q``, ``k``, ``v`` and
    ``softmax`` are the operands of its two products, at which rows of ``bias_k``, ``bias_v`` and of zeros have been
    appended, which every query sees (PyTorch hides them where ``is_causal`` and not ``need_weights``). The weights it
    returns are those that multiply v.

    Args:
        packed: the module whose weights are taken, as they are.

    Raises:
        ValueError: a nested tensor, or ``is_causal`` without its mask.
        TypeError: a mask that is neither bool nor floating point.
    """

    in_proj_weight = in_proj_bias = None  # no fast path around the layers: nn.TransformerEncoderLayer looks here

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = packed.embed_dim, packed.num_heads, packed.batch_first
        self.dropout, self.add_zero_attn = packed.dropout, packed.add_zero_attn
        self._qkv_same_embed_dim = packed._qkv_same_embed_dim  # this too is read from outside
        weights: Sequence[Any] = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        if packed.in_proj_weight is not None:
            weights = packed.in_proj_weight.chunk(3)
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.bias_k, self.bias_v = packed.bias_k, packed.bias_v
        self.q, self.k, self.v, self.softmax = Operand(), Operand(), Operand(), Operand()
        self.train(packed.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if query.is_nested:
            raise ValueError("query must be a dense tensor, got a nested one")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be the causal mask where is_causal is True, got None")
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        batched = query.ndim == 3
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, row.expand(len(x), 1, -1)], 1) for x, row in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = self.q(q), self.k(k), self.v(v)

        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = _masked(scores, attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, scores.shape[:2]))
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask.unflatten(-1, (1, 1, -1)))
        weights = self.softmax(F.dropout(scores.softmax(-1), self.dropout, self.training))
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))

        weights = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    outside, inside = weight.shape
    layer = nn.Linear(inside, outside, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """With −∞ where a bool mask is True, or a float mask added; rows that were appended to k are seen."""
    mask = F.pad(mask, (0, scores.shape[-1] - mask.shape[-1]))
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"a mask must be bool or floating point, got {mask.dtype}")
    return scores + mask


@full_precision()
@torch.no_grad()
def replace_attention(model: nn.Module, run: Callable) -> None:
    """Put an :class:`Attention` in the place of each ``nn.MultiheadAttention``, in place; ``run(model)`` executes it.

    A subclass, whose forward may be its own, stays as it is. PyTorch's fast path, which calls no layer, is left for
    good, and with it nested tensors: outputs at padded positions are computed, not 0.

    Raises:
        ValueError: outputs changed by more than 1e-5 of their size, or 4 roundings of half types.
    """
    packed = {n: m for n, m in model.named_modules() if n and type(m) is nn.MultiheadAttention}
    if not packed:
        return
    with _slow_path():
        before = run(model)
    for module in packed.values():
        _replace(model, module)
    check_unchanged(f"layers in place of nn.MultiheadAttention ({', '.join(packed)})", before, run(model), 1e-5)


@contextmanager
def _slow_path() -> Iterator[None]:
    """A forward in which every module calls the modules inside it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _replace(model: nn.Module, packed: nn.MultiheadAttention) -> None:
    new = Attention(packed)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is packed:
                setattr(parent, name, new)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False


def expose_operands(model: nn.Module, run: Callable) -> list[str]:
    """Give the attentions of a model operands, in place; ``run(model)`` executes it. Returns the operands' names.

    Known structures, of modules that are called: a linear layer ``qkv`` with q, k and v in three equal parts beside a
    ``proj`` of that width (timm, DINO, SAM), three linear layers named as :data:`SEPARATE` has it (transformers,
    diffusers), or two named as :data:`JOINT` has it, of which the second returns k and then v, each as wide as q
    (SegFormer, PVT, cross attentions). Where ``q_norm`` and ``k_norm`` follow, it is those that return q and k. What
    comes between, such as a rotation of positions, comes after the quantizer. The softmax is what the last child that
    is a dropout or a softmax returns, if that is one: no negative values, rows that sum to 1.
    """
    softmax: dict[str, bool] = {}  # of what was called, in order: whether it returned one each time

    def note(name, module, args, kwargs, output) -> None:
        so_far = softmax.pop(name, True)
        softmax[name] = so_far and isinstance(module, SOFTMAX) and _is_softmax(output)

    observe(model, run, after=note)
    for name, module in list(model.named_modules()):
        if not isinstance(module, Attention):
            called = {n.rpartition(".")[2]: s for n, s in softmax.items() if n and n.rpartition(".")[0] == name}
            for child, labels in _places(module, called).items():
                expose(module.get_submodule(child), labels)
    return [name for name, module in model.named_modules() if isinstance(module, Operand)]


def _is_softmax(x: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 3:
        return False
    return bool((x >= 0).all() and ((x.float().sum(-1) - 1).abs() < 1e-2).all())


def _places(module: nn.Module, called: Mapping[str, bool]) -> dict[str, list[str | None]]:
    """Which children of a module, of those ``called``, return operands, and which parts; none if it is no attention."""
    linear = {n: m for n, m in module.named_children() if n in called and isinstance(m, nn.Linear)}
    places: dict[str, list[str | None]] = {}
    if {"qkv", "proj"} <= linear.keys() and linear["qkv"].out_features == 3 * linear["proj"].in_features:
        places = {"qkv": ["q", "k", "v"]}
    elif names := next((names for names in SEPARATE if linear.keys() >= set(names)), None):
        places = {name: [label] for name, label in zip(names, "qkv", strict=True)}
    elif pair := next((pair for pair in JOINT if linear.keys() >= set(pair)), None):
        q, kv = pair
        if linear[kv].out_features == 2 * linear[q].out_features:  # a narrower layer may return k and v in one
            places = {q: ["q"], kv: ["k", "v"]}
    if not places:
        return {}
    for label in "qk":
        norm = f"{label}_norm"
        if norm in called and not isinstance(module.get_submodule(norm), nn.Identity):
            places = {n: [None if own == label else own for own in labels] for n, labels in places.items()}
            places[norm] = [label]
    places.update({name: ["softmax"] for name in [n for n in called if called[n]][-1:]})
    return {name: labels for name, labels in places.items() if any(labels)}


def expose(module: Any, labels: Sequence[str | None]) -> None:
    """Hand equal parts, along the last axis, of what a module returns through operands; None: the part as it is."""
    module.operand_labels = tuple(labels)
    module.operands = nn.ModuleDict({label: Operand() for label in labels if label}).train(module.training)
    module.register_forward_hook(_through_operands)


def _through_operands(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    labels = module.operand_labels
    parts = zip(labels, output.chunk(len(labels), -1), strict=True)
    ready = [module.operands[label](x) if label else x for label, x in parts]
    return ready[0] if len(ready) == 1 else torch.cat(ready, -1)


def operand_table(model: nn.Module) -> dict[str, list[str | None]]:
    """Where the operands of a model are, as a checkpoint's manifest says it: modules, and what they return."""
    table: dict[str, list[str | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            table[name] = list(OPERANDS)
        elif "operand_labels" in vars(module):
            table[name] = list(vars(module)["operand_labels"])
    return table


def restore_operands(model: nn.Module, table: Mapping[str, Sequence[str | None]]) -> None:
    """Do to a float model what :func:`replace_attention` and :func:`expose_operands` did, as a manifest says it.

    Raises:
        ValueError: the model has no such module.
    """
    modules = dict(model.named_modules())
    if wrong := [name for name in table if name not in modules]:
        raise ValueError(f"checkpoint must fit the model, got modules that it does not have: {checks.listed(wrong)}")
    for name, labels in table.items():
        if type(modules[name]) is nn.MultiheadAttention:
            _replace(model, modules[name])
        else:
            expose(modules[name], labels)


def quantized_operands(model: nn.Module) -> dict[str, list[str]]:
    """For each attention whose operands are known, by name, those that are quantized: of q, k, v and softmax."""
    found: dict[str, list[str]] = {}
    readers = input_readers(model)
    for place, labels in operand_table(model).items():
        attention = isinstance(model.get_submodule(place), Attention)
        inside = place if attention else f"{place}.operands"
        own = [label for label in labels if label and f"{inside}.{label}" in readers]
        found.setdefault(place if attention else place.rpartition(".")[0], []).extend(own)
    return {name: sorted(labels, key=OPERANDS.index) for name, labels in found.items()}


OPERANDS = ("q", "k", "v", "softmax")  # of an attention's products, as a manifest names them
