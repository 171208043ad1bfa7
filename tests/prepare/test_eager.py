"""Compiled modules: what was compiled before quantizers came is not what is watched, learned and run afterwards."""

import sys
import threading

import pytest
import torch
from helpers import same, state
from torch import nn

import hdrq
from hdrq.prepare.eager import eagerly

X = torch.randn((32, 6), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x):
        return x + self.body(x)


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).eval()


def inexact(graph, inputs):
    """A compiler whose code rounds otherwise, as those for speed may."""
    return lambda *args: [y * 1.001 for y in graph.forward(*args)]


@pytest.mark.parametrize("backend", ["eager", inexact])
@pytest.mark.parametrize("part", ["model", "block", "body"])
def test_a_compiled_model_gets_the_quantizers_of_the_plain_one(part, backend):
    options = {"iterations": 2, "progress": False, "bits": {"*": "W4A4"}}
    wanted = hdrq.quantize(net(), X, "qdrop", **options)
    compiled = net()
    if part == "model":
        compiled = torch.compile(compiled, backend=backend)
    elif part == "body":
        compiled[0].body = torch.compile(compiled[0].body, backend=backend)
    else:
        compiled[0] = torch.compile(compiled[0], backend=backend)
    with torch.no_grad():
        compiled(X)
    found = hdrq.quantize(compiled, X, "qdrop", **options)
    assert same({name.replace("_orig_mod.", ""): value for name, value in state(found).items()}, state(wanted))
    if backend == "eager":
        assert torch.equal(found(X), wanted(X))


def test_the_stance_of_the_compiler_comes_back_when_the_last_thread_leaves(monkeypatch):
    import torch._dynamo.eval_frame as dynamo

    before, inside = dynamo._stance.stance, threading.Event()
    with eagerly():
        other = threading.Thread(target=eagerly()(inside.wait))
        other.start()
    assert dynamo._stance.stance == "force_eager"
    inside.set()
    other.join()
    assert dynamo._stance.stance == before
    with pytest.raises(ZeroDivisionError), eagerly():
        raise ZeroDivisionError
    assert dynamo._stance.stance == before
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    with eagerly():
        assert dynamo._stance.stance == before
