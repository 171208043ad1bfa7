"""Eigenvalue and trace against the exact Hessian of small networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import hdrq
from hdrq.evaluate import hessian_top_eigenvalue, hessian_trace


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.ELU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)
    return nn.Sequential(*layers).eval()


def data(count=24):
    g = torch.Generator().manual_seed(1)
    return 2 * torch.randn(count, 2, 4, 4, generator=g), torch.randint(3, (count,), generator=g)


def exact(f, weights):
    """The Hessian of ``f(weights)``, flat, in float64."""
    weights = [w.detach().double() for w in weights]
    sizes = [w.numel() for w in weights]

    def flat(vector):
        return f(*(part.view(w.shape) for part, w in zip(vector.split(sizes), weights, strict=True)))

    return torch.autograd.functional.hessian(flat, torch.cat([w.flatten() for w in weights])), sizes


def exact_of(model, batch):
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    state = {name: p.detach().double() for name, p in model.named_parameters()}

    def f(*weights):
        out = functional_call(model, {**state, **dict(zip(names, weights, strict=True))}, batch[0].double())
        return F.cross_entropy(out, batch[1])

    return exact(f, [state[name] for name in names])


def check(hessian, sizes, model, batches, **options):
    """Both measures agree with the exact Hessian; the trace within four standard errors, of each layer too."""
    top = hessian_top_eigenvalue(model, cross_entropy, batches, **options, tolerance=1e-4, steps=sum(sizes))
    want = float(torch.linalg.eigvalsh(hessian)[-1])
    assert abs(top.value - want) <= max(top.residual, 1e-4 * want) and top.residual <= 1e-4 * want
    assert top.steps < sum(sizes) / 2
    trace = hessian_trace(model, cross_entropy, batches, **options, probes=160)
    blocks = [float(part.sum()) for part in hessian.diagonal().split(sizes)]
    for found, value in zip((trace.total, *trace.layers.values()), (sum(blocks), *blocks), strict=True):
        assert abs(found.value - value) < 4 * found.standard_error and found.standard_error < 0.25 * abs(sum(blocks))
    assert trace.total.value == pytest.approx(sum(layer.value for layer in trace.layers.values()))


def test_a_float_network():
    model, (x, y) = network(), data()
    before = [p.clone() for p in model.parameters()]
    halves = [(x[:12], y[:12]), (x[12:], y[12:])]
    check(*exact_of(model, (x, y)), model, halves)
    pairs = zip(before, model.parameters(), strict=True)
    assert all(torch.equal(a, b) and b.requires_grad and b.grad is None for a, b in pairs)


@pytest.mark.parametrize("activations", ["clamp", "float"])
def test_a_quantized_network_in_its_dequantized_weights(activations):
    batch = data()
    model = hdrq.quantize(network(), batch[0], "rtn", bits={"*": "W3A3"}, per_channel=True)
    with torch.no_grad():  # a narrow range, so that clamping is seen
        model[3].input_quantizer.scale.mul_(0.6)
    layers = [model[k] for k in (0, 3, 5)]

    def inputs(k, x):
        own = layers[k].input_quantizer
        return x if activations == "float" else x.clamp(own.qmin * own.scale.double(), own.qmax * own.scale.double())

    def f(a, b, c):
        a, b, c = (w.to(torch.float64) for w in (a, b, c))
        y = F.elu(F.conv2d(inputs(0, batch[0].double()), a, layers[0].bias.double()))
        y = F.relu(F.linear(inputs(1, y.flatten(1)), b, layers[1].bias.double()))
        return F.cross_entropy(F.linear(inputs(2, y), c, layers[2].bias.double()), batch[1])

    check(*exact(f, [layer.weight for layer in layers]), model, [batch], activations=activations)


def test_clamping_is_the_default():
    batch = data()
    model = hdrq.quantize(network(), batch[0], "rtn", bits={"*": "W3A3"})
    with torch.no_grad():
        model[3].input_quantizer.scale.mul_(0.5)
    clamped, free = (hessian_trace(model, cross_entropy, [batch], activations=a).total for a in ("clamp", "float"))
    assert hessian_trace(model, cross_entropy, [batch]).total == clamped != free


def test_a_diagonal_hessian_has_its_trace_without_error():
    """``½·Σ c_i·w_i²``: every probe gives Σ c_i."""
    model = nn.Linear(3, 2, bias=False).eval()
    c = torch.tensor([[1.0, 2, 3], [-4, 5, 60]])
    loss = lambda m, batch: (c * m.weight.square()).sum() / 2  # noqa: E731
    trace = hessian_trace(model, loss, [None], probes=2)
    assert (trace.total.value, trace.total.standard_error) == (67, 0)
    top = hessian_top_eigenvalue(model, loss, [None])
    assert top.value == pytest.approx(60, rel=1e-3) and top.steps <= 6
    assert hessian_top_eigenvalue(model, loss, [None], steps=1).residual > 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_eigenvalue_is_not_the_greatest_in_magnitude(sign):
    model = nn.Linear(4, 1, bias=False).eval()
    c = sign * torch.tensor([1.0, 2, 3, -90])
    loss = lambda m, batch: (c * m.weight.square()).sum() / 2  # noqa: E731
    assert hessian_top_eigenvalue(model, loss, [None]).value == pytest.approx(3 if sign == 1 else 90, rel=1e-3)


def test_seeds_give_the_same_and_other_numbers():
    model, batch = network(), data()
    a, b, c = (hessian_trace(model, cross_entropy, [batch], seed=seed) for seed in (0, 0, 1))
    assert a == b and a.total != c.total


def test_a_loss_that_is_linear_in_the_weights_is_flat():
    model = nn.Linear(3, 2).eval()
    linear = lambda m, x: m(x).mean()  # noqa: E731
    assert hessian_trace(model, linear, [torch.ones(4, 3)]).total == (0, 0)
    assert hessian_top_eigenvalue(model, linear, [torch.ones(4, 3)])[:2] == (0, 0)


def test_attention_has_a_second_derivative():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            return F.scaled_dot_product_attention(*self.qkv(x).unsqueeze(1).chunk(3, -1)).mean((1, 2))

    torch.manual_seed(0)
    model, batch = Attending().eval(), (torch.randn(6, 5, 4), torch.randint(4, (6,)))
    hessian_trace(model, cross_entropy, [batch], probes=2)


def test_models_are_measured_in_evaluation_mode():
    model, batch = nn.Sequential(*network()[:3], nn.Dropout(), *network()[3:]), data()
    found = [hessian_trace(model.train(mode), cross_entropy, [batch], probes=2).total for mode in (True, False)]
    assert found[0] == found[1] and not model.training


def test_a_layer_that_is_not_called_is_flat():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    batch = torch.randn(9, 4), torch.randint(3, (9,))
    trace = hessian_trace(Idle().eval(), cross_entropy, [batch], probes=2)
    assert trace.layers["idle"] == (0, 0) and trace.total == trace.layers["used"]


def test_a_weight_that_layers_share_is_there_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    batch = torch.randn(20, 4), torch.randint(4, (20,))
    trace = hessian_trace(model, cross_entropy, [batch], probes=4)
    assert [*trace.layers] == ["0"] and trace.total == trace.layers["0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches must be one or more, got none"),
        ({"batches": iter([1])}, "batches must be what can be gone through again, got the iterator"),
        ({"model": network().half()}, "weights of float32 or of float64 to be differentiated twice, got float16"),
        ({"model": nn.Sequential(nn.ReLU()).eval()}, "model must have a convolution, a linear layer or an embedding"),
        ({"model": nn.MultiheadAttention(4, 2).eval()}, "got nn.MultiheadAttention in the model itself; measure what"),
        ({"loss": lambda m, b: 1.0}, "loss must return a tensor of one element with a gradient, got float"),
        ({"loss": lambda m, b: m(b[0])}, r"with a gradient, got shape \(24, 3\)"),
        ({"loss": lambda m, b: m(b[0]).sum().detach()}, "with a gradient, got one without"),
        ({"loss": lambda m, b: m(b[0]).sum() * torch.nan}, "loss must be finite"),
        ({"activations": "round"}, "activations must be one of 'clamp', 'float', got 'round'"),
        ({"probes": 1}, "probes must be in"),
    ],
)
def test_what_has_no_hessian_is_refused(change, message):
    given = {"model": network(), "loss": cross_entropy, "batches": [data()], "probes": 2, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        hessian_trace(**given)
