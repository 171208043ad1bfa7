"""Following values through a run: which tensors hold nothing but what quantizers return, and which norms read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdrq.prepare.ledger import storage_of
from hdrq.prepare.uncalled import PRODUCTS

KEEPING = {  # operations of ATen whose results hold elements of their operands and zeros; in place they end in "_"
    *(
        "cat",
        "stack",
        "clone",
        "copy",
        "_to_copy",
        "detach_copy",
        "view_copy",
        "_unsafe_view",
        "repeat",
        "roll",
        "flip",
    ),
    *("index", "index_select", "index_put", "_index_put_impl", "index_copy", "gather", "take"),
    *(
        "masked_select",
        "scatter",
        "masked_scatter",
        "slice_scatter",
        "select_scatter",
        "where",
        "tril",
        "triu",
        "sort",
        "topk",
    ),
    *("split_copy", "split_with_sizes_copy", "unbind_copy", "im2col", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "native_channel_shuffle", "relu", "max", "min", "amax", "amin", "maximum", "minimum"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "mkldnn_max_pool2d", "mkldnn_max_pool3d", "quantized_max_pool2d"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d"),
    *("adaptive_max_pool2d", "adaptive_max_pool3d", "max_unpool2d", "max_unpool3d"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d"),
    *("replication_pad3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
}
AVERAGING = {  # whose results are averages of few elements of their operands
    *("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d"),
    *("_adaptive_avg_pool3d", "mkldnn_adaptive_avg_pool2d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
}
FILLING = {"constant_pad_nd": 2, "masked_fill": 2, "index_fill": 3, "clamp_min": 1}  # likewise if this argument is 0
FILLED = {"zeros": None, "zeros_like": None, "new_zeros": None, "zero": None, "fill": 1, "full": 1, "full_like": 1}
FILLED |= {"new_full": 2, "scalar_tensor": 0}  # hold nothing else than that argument, or zeros
NORMS = {"rsqrt", "sqrt", "var", "var_mean", "std", "std_mean"}  # besides those that have "norm" in their name


class Values(NamedTuple):
    """Where the elements of a tensor come from."""

    sources: frozenset[str]  # modules: elements are those of their quantized inputs, or averages of few
    whole: bool  # every element is one of those as it is, or zero


OTHER = Values(frozenset(), False)
ZEROS = Values(frozenset(), True)


def joined(parts: Iterable[Values]) -> Values:
    """Of a tensor that holds elements of several."""
    parts = list(parts)
    return Values(frozenset().union(*(p.sources for p in parts)), all(p.whole for p in parts))


class Flow(TorchDispatchMode):
    """While it is entered, every operation says what becomes of the values that :meth:`mark` has marked.

    Values are those of a memory, so its views share them; a part that is overwritten joins the rest. A tensor that was
    changed in place is another (:meth:`identity`). ``normalized`` are the modules whose input, marked by :meth:`enter`,
    was read by a norm before any product: an operation of that kind, or a module for which :meth:`norm` was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalized: set[str] = set()
        self.stale_reads: set[str] = set()
        self._stale: dict[int, tuple[str, torch.Tensor]] = {}
        self._values: dict[int, Values] = {}
        self._writes: Counter[int] = Counter()
        self._known: dict[int, StorageWeakRef] = {}  # while it is referred to, no other memory takes its number
        self._module: str | None = None
        self._before: set[int] = set()  # memory that depends on the module's input, through no product …
        self._behind: set[int] = set()  # … and through one

    def mark(self, x: torch.Tensor, source: str) -> None:
        """The tensor is what the quantizer of a module's input returns."""
        self._put(x, Values(frozenset([source]), True))

    def values(self, x: torch.Tensor) -> Values:
        return self._values.get(storage_of(x), OTHER) if x.is_floating_point() else OTHER

    def identity(self, x: torch.Tensor) -> tuple:
        """Equal for views of the same elements, as long as nothing is written to them."""
        if not self._keep(x) or x.is_nested:
            return id(x), x.dtype
        number = storage_of(x)
        return number, self._writes[number], x.dtype, x.storage_offset(), _extent(x)

    def enter(self, module: str, x: torch.Tensor) -> None:
        """A module that reads ``x`` is called."""
        self._module, self._before, self._behind = module, {storage_of(x)}, set()

    def leave(self) -> None:
        """It has returned."""
        self._module, self._before, self._behind = None, set(), set()

    def stale(self, x: torch.Tensor, module: str) -> None:
        """A module wrote to a copy of ``x``: if anything reads ``x`` from now on, ``stale_reads`` has the module."""
        self._stale[storage_of(x)] = module, x

    def norm(self, x: torch.Tensor) -> None:
        """A norm reads ``x``."""
        if self._module is not None and storage_of(x) in self._before:
            self.normalized.add(self._module)

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = _tensors((args, kwargs))
        result = func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        self.stale_reads |= {self._stale[n][0] for x in read if (n := storage_of(x)) in self._stale}
        values = _result(name, args, [self.values(x) for x in read[name == "copy" :] if x.is_floating_point()])
        known = {storage_of(x) for x in read}
        written = _written(func, args, kwargs)
        for x in written:
            number = storage_of(x)
            self._writes[number] += 1
            self._put(x, values if _covers(x) else joined([self._values.get(number, OTHER), values]))
        fresh = [x for x in _tensors(result) if storage_of(x) not in known]
        for x in fresh:
            self._put(x, values)
        self._follow(name, read, [*written, *fresh])
        return result

    def _follow(self, name: str, read: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        if self._module is None:
            return
        numbers = {storage_of(x) for x in read}
        behind, before = bool(numbers & self._behind), bool(numbers & self._before)
        if before and not behind and (name in NORMS or ("norm" in name and "normal" not in name)):
            self.normalized.add(self._module)
        for x in made:
            number = storage_of(x)
            self._before.discard(number)
            self._behind.discard(number)
            if behind or (before and name in PRODUCTS):
                self._behind.add(number)
            elif before:
                self._before.add(number)

    def _put(self, x: torch.Tensor, values: Values) -> None:
        if values == OTHER:
            self._values.pop(storage_of(x), None)
        elif x.is_floating_point() and self._keep(x):
            self._values[storage_of(x)] = values

    def _keep(self, x: torch.Tensor) -> bool:
        """Whether the number of a tensor's memory is its own for good; a sparse tensor has no memory of its own."""
        number = storage_of(x)
        if number not in self._known and number != id(x):
            self._known[number] = StorageWeakRef(x.untyped_storage())
        return number in self._known


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _result(name: str, args: tuple, operands: list[Values]) -> Values:
    """The values of what an operation returns or writes."""
    place = FILLED.get(name, FILLING.get(name))
    filling = args[place] if place is not None and place < len(args) else 0
    if name in FILLED:
        return ZEROS if not isinstance(filling, torch.Tensor) and filling == 0 else OTHER
    if not operands or name not in KEEPING | FILLING.keys() | AVERAGING:
        return OTHER
    values = joined(operands)
    zeros = isinstance(filling, torch.Tensor) or filling == 0  # a tensor is one of the operands
    return values if name not in AVERAGING and zeros else Values(values.sources, False)


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operation changes in place."""
    schema = func._schema.arguments
    changed = [a for a in schema if a.alias_info is not None and a.alias_info.is_write]
    places = {a.name: k for k, a in enumerate(schema)}
    given = [args[places[a.name]] if places[a.name] < len(args) else kwargs.get(a.name) for a in changed]
    return _tensors(given)


def _covers(x: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory."""
    return x.layout != torch.strided or x.numel() * x.element_size() >= x.untyped_storage().nbytes()


def _extent(x: torch.Tensor) -> tuple:
    """Which elements of its memory a tensor has, in whatever order and shape: runs of axes that are one are merged."""
    runs: list[tuple[int, int]] = []
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1] = runs[-1][0], runs[-1][1] * size
        else:
            runs.append((stride, size))
    return tuple(runs)
