"""Our FakeQuantize in the place of torch.ao's: values, gradients, state, and its own ways to prepare and convert."""

import warnings

import pytest
import torch
from helpers import assert_same_bits, sample
from torch import nn

ao = pytest.importorskip("torch.ao.quantization")
from hdrq.compat import FakeQuantize, LearnableFakeQuantize  # noqa: E402

WEIGHT = {"observer": ao.MovingAveragePerChannelMinMaxObserver, "quant_min": -128, "quant_max": 127}
WEIGHT |= {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
ACTIVATION = {"observer": ao.MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 255}
QCONFIG = ao.QConfig(activation=FakeQuantize.with_args(**ACTIVATION), weight=FakeQuantize.with_args(**WEIGHT))
X = sample((6, 3, 8, 8), special=False)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, UserWarning, FutureWarning))
        yield


@pytest.mark.parametrize("options", [WEIGHT, ACTIVATION, WEIGHT | {"qscheme": torch.per_channel_affine, "ch_axis": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_gradients_and_state_are_torchs(options, dtype):
    ours, theirs = FakeQuantize(**options), ao.FakeQuantize(**options)
    for seed in range(3):
        results = []
        for module in (ours, theirs):
            x = sample(X.shape, dtype, seed=seed, special=False).requires_grad_()
            y = module(x)
            y.backward(torch.ones_like(y))
            results.append((y, x.grad))
        for got, want in zip(*results, strict=True):
            assert_same_bits(got, want)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], value)
    restored = ao.FakeQuantize(**options)
    restored.load_state_dict(ours.state_dict())
    assert_same_bits(restored.scale, ours.scale)


LEARNABLE = [
    {"observer": ao.MovingAverageMinMaxObserver},
    {
        "observer": ao.MovingAverageMinMaxObserver,
        "qscheme": torch.per_tensor_symmetric,
        "quant_min": -128,
        "quant_max": 127,
    }
    | {"dtype": torch.qint8},
    {"observer": ao.MovingAveragePerChannelMinMaxObserver, "qscheme": torch.per_channel_affine, "channel_len": 3}
    | {"ch_axis": 1, "use_grad_scaling": True},
]


@pytest.mark.parametrize("options", LEARNABLE)
@pytest.mark.parametrize("learns", [False, True])
def test_learnable_grids_are_torchs(options, learns):
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    results = []
    for kind in (LearnableFakeQuantize, _LearnableFakeQuantize):
        module = kind(**options, scale=0.03)
        module.enable_static_estimate()
        module(X)
        if learns:
            module.enable_param_learning()
            module.scale.data[0] = -1.0  # raised to eps
            module.zero_point.data.add_(0.4)
        x = X.clone().requires_grad_()
        y = module(x)
        y.backward(sample(X.shape, seed=1, special=False))
        results.append((y.detach(), x.grad, module.scale.grad, module.zero_point.grad, module.state_dict()))
    (y, grad_x, grad_s, grad_z, state), (want, *expected, state_of_torch) = results
    assert_same_bits(y, want)
    assert list(state) == list(state_of_torch)
    assert all(torch.equal(state[name], state_of_torch[name]) for name in state)
    for got, other in zip((grad_x, grad_s, grad_z), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-2 if got is not grad_x else 1e-6)


def test_it_is_one_of_torchs():
    module = FakeQuantize(**ACTIVATION)
    assert isinstance(module, ao.FakeQuantize)
    assert [t.shape for t in (module.scale, module.zero_point)] == [(1,), (1,)]


def test_switches():
    module = FakeQuantize(**ACTIVATION)
    module(X)
    scale = module.scale.clone()
    module.apply(ao.disable_observer)
    module(10 * X)
    assert_same_bits(module.scale, scale)
    module.apply(ao.disable_fake_quant)
    assert module(X) is X
    module.apply(ao.enable_observer)
    module(10 * X)
    assert module.scale > scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [ACTIVATION, WEIGHT])
def test_a_script_runs_torchs_own_pass(options):
    module, eager = FakeQuantize(**options), FakeQuantize(**options)
    script = torch.jit.script(module)
    assert "aten::fake_quantize_per" in str(script.inlined_graph)
    for _ in range(2):
        assert_same_bits(script(X), eager(X))
        script.disable_observer()
        eager.disable_observer()
    assert all(torch.equal(script.state_dict()[name], value) for name, value in eager.state_dict().items())
    assert_same_bits(module(X), eager(X))  # which shares the script's state, and stays as it was


@pytest.mark.parametrize("x", [X, X.unsqueeze(2).expand(6, 3, 2, 8, 8).contiguous()])
def test_half_types_and_memory_formats_stay(x):
    module = FakeQuantize(**ACTIVATION)
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    y = module(x.contiguous(memory_format=last))
    assert y.is_contiguous(memory_format=last)
    assert_same_bits(y.contiguous(), FakeQuantize(**ACTIVATION)(x))
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_a_module_of_channels_must_have_observed():
    module = FakeQuantize(**WEIGHT)
    module.disable_observer()
    with pytest.raises(ValueError, match="scale must have 6 elements, the length of ch_axis 0, got one"):
        module(X)


def test_a_module_may_be_called_twice_while_it_observes():
    module, x = FakeQuantize(**ACTIVATION), X.clone().requires_grad_()
    (module(x) + module(2 * x)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def test_eager_training_converts():
    model = nn.Sequential(ao.QuantStub(), *network(), ao.DeQuantStub()).train()
    model = ao.fuse_modules_qat(model, [["1", "2", "3"]])
    model.qconfig = QCONFIG
    model = trained(ao.prepare_qat(model)).eval()
    assert sum(isinstance(m, FakeQuantize) for m in model.modules()) == 5
    expected = model(X)
    assert (ao.convert(model)(X) - expected).abs().max() <= 2 * model[5].activation_post_process.scale


def test_graph_mode_training_converts():
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    mapping = ao.QConfigMapping().set_global(QCONFIG)
    model = trained(prepare_qat_fx(network().train(), mapping, (X,))).eval()
    expected = model(X)
    converted = convert_fx(model)
    assert (converted(X) - expected).abs().max() <= 0.05 * expected.abs().max()
