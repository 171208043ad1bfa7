import copy

import pytest
import torch
from helpers import assert_same_bits, sample
from torch import nn
from torch.nn.utils import parametrize

import hdrq
from hdrq.compat import LSQ, NoiseQuantize

X = sample((4, 8), special=False)


def test_lsq_is_a_parametrization_and_learns():
    layer = nn.Linear(8, 4)
    step = LSQ.initial_scale(layer.weight, bits=3, axis=0)
    latent = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", LSQ(step, bits=3, axis=0))
    want = hdrq.ops.fake_quantize(latent, step, -4, 3, axis=0)
    assert_same_bits(layer.weight, want)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    losses = []
    for _ in range(20):
        loss = (layer(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    quantizer = layer.parametrizations.weight[0]
    assert losses[-1] < losses[0] and not torch.equal(quantizer.scale, step)


def test_lsq_has_its_factor_and_its_gradient():
    quantizer, x = LSQ(0.25, bits=4, signed=False), torch.tensor([-0.05, 0.3, 3.8])  # x/s = −0.2, 1.2, 15.2
    x.requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 0]  # −0.2 rounds into the range, and LSQ clamps first
    assert quantizer.scale.grad.item() == pytest.approx((3 * 15) ** -0.5 * (0 - 0.2 + 15), rel=1e-5)


@pytest.mark.parametrize(("axis", "want"), [(None, [2 * 2.5 / 3**0.5]), (0, [2 * 1.5 / 3**0.5, 2 * 3.5 / 3**0.5])])
def test_initial_scale_is_the_papers(axis, want):
    x = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    assert LSQ.initial_scale(x, bits=3, axis=axis).tolist() == pytest.approx(want)


def test_noise_is_drawn_anew_repeatable_and_off_in_eval():
    quantizer = NoiseQuantize(0.25, bits=4, seed=5, stream=2)
    again = copy.deepcopy(quantizer)
    first, second = quantizer(X), quantizer(X)
    assert not torch.equal(first, second)
    state = hdrq.rng_state(5, 2, 1)
    assert_same_bits(second, hdrq.ops.noise_quantize(X, torch.tensor([0.25]), -8, 7, state))
    again(X)
    restored = NoiseQuantize(1.0, bits=4)
    restored.load_state_dict(again.state_dict())
    assert_same_bits(restored(X), second)
    assert_same_bits(restored.eval()(X), hdrq.ops.fake_quantize(X, torch.tensor([0.25]), -8, 7))


def test_a_module_that_is_called_twice_learns_from_both_draws():
    quantizer = NoiseQuantize(0.25, bits=4)
    (quantizer(X) + quantizer(X)).sum().backward()
    total = 0.0
    for step in (0, 1):
        s = torch.tensor([0.25], requires_grad=True)
        hdrq.ops.noise_quantize(X, s, -8, 7, hdrq.rng_state(0, 0, step)).sum().backward()
        total += s.grad.item()
    assert quantizer.scale.grad.item() == pytest.approx(total * (X.numel() * 7) ** -0.5, rel=1e-5)


@pytest.mark.parametrize("quantizer", [LSQ(0.25, bits=4), NoiseQuantize(0.25, bits=4)])
def test_they_compile_in_one_graph(quantizer):
    compiled = torch.compile(copy.deepcopy(quantizer), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
        want, got = quantizer(a), compiled(b)
        want.square().sum().backward()
        got.square().sum().backward()
        assert_same_bits(got, want)
        assert_same_bits(b.grad, a.grad)


@pytest.mark.parametrize("quantizer", [LSQ(0.25, bits=4).eval(), NoiseQuantize(0.25, bits=4).eval()])
def test_they_export_with_a_dynamic_batch(quantizer):
    program = torch.export.export(quantizer, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = sample((9, 8), special=False)
    assert_same_bits(program.module()(more), quantizer(more))


def test_a_pass_that_checkpointing_runs_again_is_refused():
    from torch.utils.checkpoint import checkpoint

    y = checkpoint(NoiseQuantize(0.25, bits=4), X.clone().requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="noise must not be drawn inside a backward pass"):
        y.sum().backward()


def test_bad_input():
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got 0\.0"):
        LSQ(0.0, bits=4)
    with pytest.raises(ValueError, match=r"bits must be in \[2, 16\], got 1"):
        LSQ(1.0, bits=1)
    with pytest.raises(ValueError, match="noise must be one of 'uniform', 'empirical', got 'odd'"):
        NoiseQuantize(1.0, bits=4, noise="odd")
    with pytest.raises(ValueError, match="scale must have one element without an axis, got 3"):
        LSQ(torch.ones(3), bits=4)
