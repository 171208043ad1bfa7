"""Weights that no quantizer would see are quantized by a registered class, or refused by name."""

import functools

import pytest
import torch
import torch.nn.functional as F
from networks import Block, data
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.quantizers import layers
from hdrq.quantizers.layers import quantized_layers, register_layer

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Bare(nn.Module):
    """A matrix that a function reads, and a head that is a layer."""

    def __init__(self, shape, compute):
        super().__init__()
        self.big, self.head = nn.Parameter(torch.randn(shape) * 0.2), nn.Linear(12, 3)
        self.compute = compute

    def forward(self, x):
        return self.head(self.compute(x, self.big))


class Held(nn.Module):
    """A module that holds its weights itself."""

    def __init__(self, module, compute=lambda module, x: module(x)):
        super().__init__()
        self.big, self.head, self.compute = module, nn.Linear(12, 3), compute

    def forward(self, x):
        return self.head(self.compute(self.big, x))


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.b(F.linear(x, self.a.weight))


SILENT = {
    "linear": lambda: Bare((12, 6), lambda x, w: F.linear(x, w)),
    "product with a transposed view": lambda: Bare((6, 12), lambda x, w: x @ w.t().t()),
    "einsum": lambda: Bare((6, 12), lambda x, w: torch.einsum("bi,io->bo", x, w)),
    "experts in one tensor": lambda: Bare((2, 6, 12), lambda x, w: torch.bmm(x.expand(2, -1, -1), w).sum(0)),
    "one expert of a tensor": lambda: Bare((2, 6, 12), lambda x, w: x @ w[1]),
    "convolution": lambda: Bare((12, 1, 3), lambda x, w: F.conv1d(x[:, None], w).mean(2)),
    "bilinear": lambda: Held(nn.Bilinear(6, 6, 12), lambda module, x: module(x, x)),
    "LSTM": lambda: Held(nn.LSTM(6, 12, batch_first=True), lambda module, x: module(x[:, None])[0][:, -1]),
    "GRU cell": lambda: Held(nn.GRUCell(6, 12)),
    "layer that is not called": Uncalled,
}


@pytest.mark.parametrize("name", SILENT)
def test_a_matrix_that_is_no_layers_is_refused_by_name_unless_a_pattern_keeps_it(name):
    model = SILENT[name]().eval()
    where = "'a'" if isinstance(model, Uncalled) else "'big"
    with pytest.raises(ValueError, match=f"weights that are read without a call: {where}"):
        hdrq.quantize(model, X, "rtn", bits="W4A4")
    kept = hdrq.quantize(model, X, "rtn", bits={where.strip("'"): "float", "*": "W4A4"})
    assert list(quantized_layers(kept)) == ["b" if isinstance(model, Uncalled) else "head"]


class Latents(nn.Module):
    """A matrix that a layer reads as its input, as a Perceiver's latents are, is an activation."""

    def __init__(self):
        super().__init__()
        self.latents, self.key, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head((self.key(self.latents) @ x.t()).t() @ self.key(self.latents))


def test_a_parameter_that_a_layer_reads_is_an_activation():
    assert list(quantized_layers(hdrq.quantize(Latents().eval(), X, "rtn", bits="W8A8"))) == ["key", "head"]


class Transposed(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2 has it."""

    def __init__(self, width, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, outputs) * 0.2), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_a_registered_class_is_quantized_learned_saved_and_loaded(tmp_path, monkeypatch):
    model = nn.Sequential(Transposed(6, 12), nn.ReLU(), Transposed(12, 3)).eval()
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        hdrq.quantize(model, X, "rtn")
    monkeypatch.setattr(layers, "_registered", {})
    register_layer(Transposed, axis=1)
    quantized = hdrq.quantize(model, X, "qdrop", iterations=2, per_channel=True, progress=False)
    shapes = {name: tuple(layer.weight_quantizer.scale.shape) for name, layer in quantized_layers(quantized).items()}
    assert shapes == {"0": (12,), "2": (3,)}
    hdrq.save(quantized, tmp_path / "q.hdrq")
    with torch.no_grad():
        assert torch.equal(hdrq.load(tmp_path / "q.hdrq", model)(X), quantized(X))
    with pytest.raises(TypeError, match="kind must be a class of modules, got 3"):
        register_layer(3)


def test_a_copy_that_runs_the_originals_layers_is_refused():
    model = nn.Sequential(Block(), Block()).eval()
    for replaced in (
        lambda block: lambda x: type(block).forward(block, x),
        lambda block: functools.partial(lambda held, x: type(held[0]).forward(held[0], x), Unshared(block)),
    ):
        model[1].forward = replaced(model[1])
        with pytest.raises(ValueError, match=r"copy that reads the original's '1\.first\.weight'"):
            hdrq.quantize(model, torch.randn(4, 4, 5, 5), "rtn")
        del model[1].forward


class Unshared(list):
    """A holder that is not copied with what holds it."""

    def __init__(self, block):
        super().__init__([block])

    def __deepcopy__(self, memo):
        return self


def test_a_weight_that_is_handed_to_a_function_is_refused():
    class Subclass(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias, self.idle = nn.Linear(8, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.qkv.weight, self.bias) + self.tied(x) + F.linear(x, self.tied.weight)

    x = data(9, 6, 5)
    for module, name in ((Subclass(8, 2), "1"), (Reader(), "1.qkv")):
        model = nn.Sequential(nn.Linear(5, 8), module).eval()
        for bits in ("W4A4", {"*": "W4A4", name: "float"}):  # the first pattern decides
            with pytest.raises(ValueError, match=f"must call its layers .* read without a call: '{name}'; call"):
                hdrq.quantize(model, x, "rtn", bits=bits)
        hdrq.quantize(model, x, "rtn", bits={name: "float", "*": "W4A4"})


class Listed(nn.Module):
    """Layers in a list, which are no modules of the model."""

    def __init__(self):
        super().__init__()
        self.kept, self.head = {"layers": [nn.Linear(6, 6), Block()], "text": "x"}, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.kept["layers"][0](x))


def test_layers_that_no_module_registers_are_refused():
    with pytest.raises(ValueError, match=r"without a call: 'kept\.layers\.0\.weight'; .* nn\.ModuleList"):
        hdrq.quantize(Listed().eval(), X, "rtn")
    hdrq.quantize(Listed().eval(), X, "rtn", bits={"kept": "float", "*": "W4A4"})
    outside = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"got a parameter of \(6, 6\) in none of its attributes"):
        hdrq.quantize(Held(nn.Linear(6, 12), lambda layer, x: layer(outside(x))).eval(), X, "rtn")


def test_a_complex_matrix_is_refused_and_counted():
    model = Bare((6, 12), lambda x, w: (x.to(w.dtype) @ w).real)
    model.big = nn.Parameter(torch.randn(6, 12, dtype=torch.cfloat))
    with pytest.raises(ValueError, match="without a call: 'big'"):
        hdrq.quantize(model.eval(), X, "rtn")
    kept = hdrq.quantize(model, X, "rtn", bits={"big": "float", "*": "W4A4"})
    assert report_of(kept).coverage.parameters == (36, 36 + 3 + 72)


def test_modules_under_vmap_are_refused():
    with pytest.raises(ValueError, match=r"must not call its modules inside torch\.vmap .* got a call of 'big'"):
        hdrq.quantize(Held(nn.Linear(6, 12), lambda layer, x: torch.vmap(layer)(x)).eval(), X, "rtn")
