"""What a model must be before it is quantized, and what the messages say where it is not."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from networks import data, lively
from torch import nn
from torch.nn.utils import parametrizations, prune

import hdrq
from hdrq.prepare.copying import copy_model
from hdrq.prepare.float_model import check_float, check_module, prepare_float
from hdrq.quantizers.layers import quantized_layers

X = data(32, 6)


def three():
    return lively(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)))


class Drawing(nn.Module):
    """Adds noise in evaluation mode too."""

    def forward(self, x):
        return x + torch.randn_like(x)


class Counting(nn.Module):
    """Adds how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


@pytest.mark.parametrize(
    "kind, why", [(Drawing, "it draws random numbers"), (Counting, "it keeps state from one call")]
)
def test_a_model_whose_runs_differ_is_refused_and_batchnorm_is_not_blamed(kind, why):
    message = f"model must give the same output for the same input, got a relative difference of .* two runs: {why}"
    with pytest.raises(ValueError, match=message) as caught:
        hdrq.quantize(nn.Sequential(*three(), kind()).eval(), X, "rtn")
    assert "BatchNorm" not in str(caught.value)


def test_a_source_whose_runs_differ_is_called_source():
    with pytest.raises(ValueError, match="source must give the same output"):
        prepare_float(nn.Sequential(nn.Linear(6, 3), Drawing()).eval(), lambda m: m(X), "source")


def test_a_run_that_differs_names_modules_in_training_mode():
    class Own(nn.Module):
        def forward(self, x):
            return F.dropout(x, training=self.training)

    model = nn.Sequential(*three(), Own()).eval()
    model[5].train()
    with pytest.raises(ValueError, match="draws random numbers; in training mode: '5'"):
        hdrq.quantize(model, X, "rtn")


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_a_part_in_training_mode_is_named(part):
    model = nn.Sequential(*three(), nn.Sequential(part)).eval()
    part.train()
    with pytest.raises(ValueError, match=r"training mode in '5\.0'; call model\.eval\(\)"):
        hdrq.quantize(model, X, "rtn")


def test_a_part_whose_mode_makes_no_difference_may_be_in_training_mode():
    model = nn.Sequential(*three().eval(), nn.ReLU(), nn.Dropout(0.0))
    assert model.training
    model.training = False
    hdrq.quantize(model, X, "rtn")


REPARAMETRIZED = {
    "remove_parametrizations": parametrizations.weight_norm,
    "remove_spectral_norm": nn.utils.spectral_norm,
    "prune.remove": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("way", REPARAMETRIZED)
def test_a_computed_weight_is_refused_where_it_is_to_be_quantized(way):
    model = three()
    REPARAMETRIZED[way](model[2])
    model(X)
    before = model.eval()(X)
    with pytest.raises(ValueError, match=rf"plain weights, got a parametrized one in '2'; make it plain by .*{way}\("):
        hdrq.quantize(model, X, "rtn")
    q = hdrq.quantize(model, X, "rtn", bits={"2": "float", "*": "W8A8"})
    assert list(quantized_layers(q)) == ["0", "4"]
    assert (q(X) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2, torch.int8, torch.complex64])
def test_a_weight_of_another_type_is_named(dtype):
    class Wide(nn.Linear):
        def forward(self, x):
            weight = self.weight.real if self.weight.is_complex() else self.weight
            return F.linear(x, weight.float(), self.bias)

    model = three()
    model[2] = Wide(12, 12)
    model[2].weight = nn.Parameter(model[2].weight.detach().mul(3).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"weights of float32, bfloat16 or float16, got {dtype} in '2'; "):
        hdrq.quantize(model.eval(), X, "rtn")
    hdrq.quantize(model.eval(), X, "rtn", bits={"2": "float", "*": "W4A4"})


def test_a_weight_that_is_not_there_is_named():
    model = three()
    model[2].to("meta")
    with pytest.raises(
        ValueError, match=r"model must hold its weights, got tensors on the meta .*: 2.weight; 2.bias; "
    ):
        hdrq.quantize(model, X, "rtn")
    with pytest.raises(ValueError, match=r"model must have initialized weights, got 0.weight; 0.bias; run it"):
        check_float("model", nn.Sequential(nn.LazyLinear(3)).eval())


class Sharded(torch.Tensor):
    """A tensor made of another, as DTensor is and as quantized weights of other libraries are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, *_):
        return cls(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(func(args[0].inner, *args[1:], **(kwargs or {})))


def test_distributed_models_are_named():
    model = three()
    model[2].weight = nn.Parameter(Sharded(model[2].weight.data))
    with pytest.raises(TypeError, match=r"must hold plain tensors, got Sharded in '2\.weight'; gather"):
        check_float("model", model)
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    with pytest.raises(TypeError, match=r"got DistributedDataParallel around one; give model\.module"):
        check_float("model", parallel)


def test_models_that_are_not_eager_are_refused_by_their_kind():
    model = three()
    program = torch.export.export(model, (X,))
    for made, kind in (
        (torch.jit.script(model), "got RecursiveScriptModule of torch.jit"),
        (torch.jit.trace(model, X), "got TopLevelTracedModule of torch.jit"),
        (program, "got ExportedProgram of torch.export"),
        (program.module(), "got an exported program"),
    ):
        with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module, {kind}.*; give the eager model"):
            check_module("model", made)
    inside = nn.Sequential(nn.Linear(6, 6), torch.jit.script(model)).eval()
    with pytest.raises(TypeError, match="model must be eager to be quantized, got a ScriptModule in '1'"):
        hdrq.quantize(inside, X, "rtn")
    check_module("model", torch.fx.symbolic_trace(model))


def test_what_cannot_be_copied_is_named():
    model = three()
    model[2].cache = {"lock": threading.Lock()}
    with pytest.raises(
        TypeError, match=r"model must be a module that can be copied, got attribute 'cache' \(dict\) of '2'"
    ):
        hdrq.quantize(model, X, "rtn")


def test_a_tensor_kept_from_a_run_is_copied_without_its_graph():
    class Record:
        pass

    model, record = three(), Record()
    record.features = [model[0](X)]
    model[2].kept, model[0].record = {"map": model[0](X)}, record
    copied = copy_model("model", model)
    assert copied[2].kept["map"].is_leaf and torch.equal(copied[2].kept["map"], model[2].kept["map"])
    assert copied[0].record.features[0].grad_fn is None
    assert model[2].kept["map"].grad_fn is not None  # the caller's is left as it is
    assert copy.deepcopy(copied) is not None
