"""Chained inputs and targets: the same tensors as running the whole model, each block run once; wherever they lie."""

from contextlib import suppress

import pytest
import torch
from helpers import same, state
from networks import learn, net
from torch import nn
from torch.utils._pytree import tree_leaves

from hdrq.calibrate import cache
from hdrq.calibrate.cache import Cache, batches
from hdrq.calibrate.data import Call
from hdrq.calibrate.propagate import Activations
from hdrq.calibrate.trace import Leaf, trace

CPU = torch.device("cpu")


class Scale(nn.Module):
    """A block: ``x · w + b`` over the last axis, in place if it is told so; counts how often it runs."""

    def __init__(self, size, inplace=False):
        super().__init__()
        self.w, self.inplace, self.runs = nn.Parameter(torch.randn(size)), inplace, 0

    def forward(self, x, *, bias=0.0):
        self.runs += 1
        y = x.mul_(self.w) if self.inplace else x * self.w
        return y + bias


class Base(nn.Module):
    size = 6

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (Scale(self.size) for _ in range(4))


class Straight(Base):
    """Each block reads what the one before it returned."""

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


class Skips(Base):
    """An encoder and decoder: what lies between blocks is computed, and from far back."""

    def forward(self, x):
        a = self.a(x)
        b = self.b(a[:, ::2].repeat(1, 2))
        c = self.c(b + 1)
        return self.d(torch.cat([c[:, :3], a[:, 3:]], 1))


class InPlace(Base):
    """What follows a block, and a block itself, changes tensors in place."""

    def __init__(self):
        super().__init__()
        self.b = Scale(self.size, inplace=True)

    def forward(self, x):
        a = self.a(x)
        a += 1
        b = self.b(a)
        return self.d(self.c(b.relu_()))


class Tuples(Base):
    """Tokens first, arguments by name, a mask for all samples, and results in a tuple."""

    def forward(self, x):
        mask = torch.eye(self.size)[0]
        tokens = torch.stack([x, 2 * x])  # (2, N, size)
        a = self.a(tokens, bias=mask)
        b, n = self.wrap(a)
        c = self.c(x=b, bias=mask)
        return self.d(c[0]) * n

    def wrap(self, a):
        return self.b(a), 3


class Reused(Base):
    """One block runs twice."""

    def forward(self, x):
        return self.d(self.a(self.b(self.a(x)) + 1))


class Decided(Base):
    """What a block reads depends on another's output by a number read on the host."""

    def forward(self, x):
        a = self.a(x)
        b = self.b(x)
        c = self.c(b if float(a.sum()) * 0 == 0 else -b)
        return self.d(c)


class Windows(Base):
    """Blocks that read several rows for each sample."""

    def forward(self, x):
        a = self.a(x.repeat_interleave(3, 0).clone())
        return self.d(self.b(a).unflatten(0, (-1, 3)).sum(1))


def truth(model, name, x):
    """The arguments and the result of a block's first call."""
    seen = []

    class Stop(Exception):
        pass

    def hook(module, args, kwargs, output):
        seen.append((inputs, output.clone()))
        raise Stop

    def before(module, args, kwargs):
        nonlocal inputs
        inputs = [t.clone() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]

    inputs = []
    block = model.get_submodule(name)
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(hook, with_kwargs=True),
    ]
    with suppress(Stop), torch.no_grad():
        model(x.clone())
    for handle in handles:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", [Straight, Skips, InPlace, Tuples, Reused, Decided, Windows])
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_inputs_and_outputs_are_those_of_the_whole_model(kind, where, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval().requires_grad_(False), torch.randn(10, 6)
    calls = [Call((part,), {}) for part in x.split(4)]  # 4, 4, 2
    names = [n for n in "abcd" if not (kind is Reused and n == "c") and not (kind is Windows and n == "c")]
    nodes = trace(model, names, calls[0])
    for module in model.children():
        module.runs = 0
    cache = Cache(CPU, where, folder=tmp_path)
    activations = Activations(model, nodes, calls, cache)
    for k, name in enumerate(names):
        rows = activations.inputs(k)
        inputs, output = truth(model, name, x)
        got = [leaf.tensor(r.read(0, 10)) for leaf, r in zip(nodes[k].inputs.batched, rows, strict=True)]
        want = [t for t in inputs if 10 in t.shape or 30 in t.shape]
        assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        runs = model.get_submodule(name).runs
        target = activations.run(k, rows)[nodes[k].outputs.main]
        assert model.get_submodule(name).runs == runs + len(calls)
        assert torch.equal(nodes[k].outputs.batched[0].tensor(target.read(0, 10)), output)
        activations.forget(k)
    assert cache.peak[where] > 0 and not list(tmp_path.iterdir())


def test_each_block_runs_once_over_the_calibration_set():
    for kind in (Straight, Skips, InPlace):
        model = kind().eval().requires_grad_(False)
        calls = [Call((part,), {}) for part in torch.randn(12, 6).split(4)]
        nodes = trace(model, list("abcd"), calls[0])
        for module in model.children():
            module.runs = 0
        activations = Activations(model, nodes, calls, Cache(CPU))
        for k in range(4):
            activations.run(k, activations.inputs(k))
            activations.forget(k)
        assert [module.runs for module in model.children()] == [3, 3, 3, 3]


def test_outputs_are_kept_no_longer_than_needed():
    model, calls = Skips().eval().requires_grad_(False), [Call((torch.randn(4, 6),), {})]
    nodes = trace(model, list("abcd"), calls[0])
    assert [sorted(node.needs) for node in nodes] == [[], [0], [1], [0, 2]]
    assert all(node.reads is None for node in nodes)
    cache = Cache(CPU)
    activations = Activations(model, nodes, calls, cache)
    kept = []
    for k in range(4):
        activations.run(k, activations.inputs(k))
        activations.forget(k)
        kept.append(sorted(activations._outputs))
    assert kept == [[0], [0, 1], [0, 2], []] and cache.used["device"] == 0


def test_direct_inputs_are_not_copied():
    model, calls = Straight().eval().requires_grad_(False), [Call((torch.randn(4, 6),), {})]
    nodes = trace(model, list("abcd"), calls[0])
    assert [node.reads for node in nodes] == [None, ((0, 0),), ((1, 0),), ((2, 0),)]
    activations = Activations(model, nodes, calls, Cache(CPU))
    output = activations.run(0, activations.inputs(0))
    assert activations.inputs(1) == output


def test_block_without_tensors_that_grow_is_left_out():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Scale(6), Scale(6)

        def forward(self, x):
            return self.b(x) + self.a(torch.ones(6))

    assert [node.name for node in trace(Constant().eval(), ["a", "b"], Call((torch.zeros(3, 6),), {}))] == ["b"]


def test_block_without_floats_that_grow_is_refused():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Signs()

        def forward(self, x):
            return self.a(x).float()

    class Signs(nn.Module):
        def forward(self, x):
            return x > 0

    with pytest.raises(ValueError, match="block a must read tensors that grow with the batch, and return floats"):
        trace(Places().eval(), ["a"], Call((torch.zeros(3, 6),), {}))


def test_forward_of_a_models_own_is_put_back():
    model = Skips().eval().requires_grad_(False)
    model.a.forward = lambda x, own=model.a.forward: own(x)
    mine, calls = model.a.forward, [Call((torch.randn(4, 6),), {})]
    activations = Activations(model, trace(model, list("abcd"), calls[0]), calls, Cache(CPU))
    for k in range(2):
        activations.run(k, activations.inputs(k))
    assert model.a.forward is mine and "forward" not in model.b.__dict__


# --- cache


def test_leaf_turns_any_axis_into_rows():
    x = torch.arange(2 * 6 * 5).reshape(2, 6, 5)
    for leaf, shape in ((Leaf(1, 1, (2, 5), x.dtype), (6, 2, 5)), (Leaf(1, 3, (3, 2, 5), x.dtype), (2, 3, 2, 5))):
        rows = leaf.rows(x)
        assert rows.shape == shape and torch.equal(leaf.tensor(rows), x)


def test_budget_sends_what_is_over_it_to_disk(tmp_path):
    cache = Cache(CPU, "auto", budget=1000, folder=tmp_path)
    first, second, third = (cache.rows(10, (10,), torch.float32) for _ in range(3))
    assert [rows.tier for rows in (first, second, third)] == ["device", "device", "disk"]
    del first
    assert cache.used == {"device": 400, "host": 0, "disk": 400}
    assert cache.rows(10, (10,), torch.float32).tier == "device"
    assert cache.peak == {"device": 800, "host": 0, "disk": 400} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["device", "disk"])
def test_batches_are_the_rows_asked_for(where, tmp_path):
    rows = Cache(CPU, where, folder=tmp_path).rows(50, (3,), torch.bfloat16)
    values = torch.randn(50, 3).bfloat16()
    rows.write(0, values)
    indices = torch.randint(50, (20, 8), generator=torch.Generator().manual_seed(0))
    got = [batch for (batch,) in batches([rows], indices)]
    assert len(got) == 20 and all(torch.equal(a, values[i]) for a, i in zip(got, indices, strict=True))
    got[0].zero_()
    assert torch.equal(rows.read(0, 50), values)  # what is read may be written to


def test_cache_moves_no_bit():
    states = [state(learn(**o)) for o in ({}, {"cache": "disk"}, {"cache": "host"}, {"cache_bytes": 100_000})]
    assert all(same(states[0], other) for other in states[1:])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"cache": "tape"}, ValueError, "cache must be one of 'auto', 'device', 'host', 'disk', got 'tape'"),
        ({"cache_bytes": -1}, ValueError, r"cache_bytes must be in \[0, "),
        ({"graph": "maybe"}, ValueError, "graph must be one of 'auto', True, False, got 'maybe'"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        learn(net(), **options)


def test_what_is_free_is_what_linux_calls_available(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable: 6000 kB\n")
    monkeypatch.setattr(cache, "MEMINFO", tmp_path / "meminfo")
    assert cache.half_of_free(CPU) == {"device": 3000 * 1024, "host": 3000 * 1024}
    for text in ("MemFree: 1000 kB\n", "MemAvailable: much\n"):
        (tmp_path / "meminfo").write_text(text)
        assert cache.half_of_free(CPU)["host"] > 2**20  # from free pages
