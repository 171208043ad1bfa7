import sys
import types

import pytest
import standin
import torch
from helpers import assert_same_bits, sample
from standin import forks, loop, quantizers

import hdrq
from hdrq.compat import patch

KNOWN = {
    "fake_quantize_per_tensor_affine": "rounding='quotient', gradient='round-first'",
    "fake_quantize_per_channel_affine": "rounding='quotient', gradient='round-first'",
    "fake_quantize_ignoring_zero": "rounding='quotient', gradient='round-first', zero point ignored",
    "fake_quantize_learnable_per_tensor_affine_training": "rounding='quotient', gradient='round-first'",
    "fake_quantize_learnableplus_per_channel_affine_training": "rounding='quotient', gradient='round-first'",
    "fake_noise_quantize_per_tensor": "empirical noise, seed=0",
    "FunLSQ": "rounding='quotient', gradient='clamp-first'",
}
KNOWN_FORKS = {
    "fake_quantize_of_a_fixed_zero": "rounding='quotient', gradient='round-first'",
    "fake_quantize_other_axis": "rounding='quotient', gradient='round-first'",
    "fake_quantize_keywords": "rounding='quotient', gradient='round-first'",
    "fake_quantize_while_enabled": "rounding='quotient', gradient='round-first'",
}
LEFT = {
    "fake_quantize_floor": "computes otherwise",
    "fake_quantize_gradient_doubled": "computes otherwise",
    "fake_quantize_with_temperature": "takes temperature, which we do not know",
    "fake_quantize_on_cuda": "it fails on a trial",
    "noise_quantize_gaussian": "its noise has another distribution",
    "fake_quantize_in_place": "it writes to its scale",
    "noise_quantize_shifted": "gives zero_point a gradient",
    "noise_quantize_scale_detached": "gives scale no gradient",
    "noise_quantize_detached": "gives x no gradient",
    "noise_quantize_summed": "returns no tensor like x",
    "noise_quantize_doubled_gradient": "its gradient of the scale is none of its noise",
    "fake_quantize_of_a_large_scale": "computes otherwise",
    "quantize_names": "takes names, which we do not know",
}
X = sample((3, 500), special=False)


def test_what_is_known_is_replaced_and_the_rest_is_left_with_a_reason():
    with patch("standin") as patched:
        forms = {r.name.rpartition(".")[2]: str(r.form) for r in patched.replaced}
        known = KNOWN | KNOWN_FORKS
        assert forms.keys() == known.keys()
        assert all(forms[name].startswith(form) for name, form in known.items())
        reasons = {name.rpartition(".")[2]: why for name, why in patched.left.items()}
        assert reasons.keys() == LEFT.keys()
        assert all(why in reasons[name] for name, why in LEFT.items())
        report = patched.report()
    assert report.startswith("standin: 11 replaced, 13 left")
    assert "left standin.forks.fake_quantize_floor: on small numbers it computes otherwise" in report


def gradients(function, *tensors, **others):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves, **others)
    found = torch.autograd.grad(y, leaves, sample(y.shape, seed=1, special=False), allow_unused=True)
    return y.detach(), [torch.zeros(1) if g is None else g for g in found]


@pytest.mark.parametrize("name", [name for name in KNOWN if "noise" not in name and name != "FunLSQ"])
def test_results_stay(name):
    channels = 3 if "per_channel" in name else 1
    scale, zero = torch.tensor([0.25, 0.5, 0.125])[:channels], torch.tensor([1.0, -2.0, 0.0])[:channels]
    others = {"quant_min": -8, "quant_max": 7} | ({"ch_axis": 0} if channels == 3 else {})
    others |= {"grad_factor": 0.5} if "learnable" in name else {}
    zeros = [zero] if "plus" in name else []
    others |= {} if zeros else {"zero_point": zero}
    want = gradients(getattr(quantizers, name), X, scale, *zeros, **others)
    with patch(standin) as patched:
        got = gradients(getattr(quantizers, name), X, scale, *zeros, **others)
        assert sum(r.calls for r in patched.replaced) == 1
    assert_same_bits(got[0] + 0.0, want[0] + 0.0)  # theirs has zeros of both signs
    for ours, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_what_does_not_learn_may_be_written_to_before_the_gradients(axis, dtype):
    x = sample((6, 6), special=False)
    scale, zero = torch.rand(6) + 0.1, torch.arange(6, dtype=dtype) - 2
    if axis is None:
        name, grid = "fake_quantize_per_tensor_affine", (scale[:1], zero[:1], -8, 7)
    else:
        name, grid = "fake_quantize_per_channel_affine", (scale, zero, axis, -8, 7)
    (want,) = torch.autograd.grad(getattr(quantizers, name)(leaf := x.clone().requires_grad_(), *grid).sum(), leaf)
    with patch("standin") as patched:
        for _ in range(2):
            kept = scale.clone(), zero.clone()
            y = getattr(quantizers, name)(leaf, *grid)
            scale.mul_(9)
            zero.add_(50)
            (got,) = torch.autograd.grad(y.sum(), leaf)
            torch.testing.assert_close(got, want)
            scale.copy_(kept[0]), zero.copy_(kept[1])
        assert sum(r.calls for r in patched.replaced) == 2 and not any(r.passed_on for r in patched.replaced)


def test_a_kind_of_call_is_compared_once_and_serves_other_lengths_and_layouts():
    function = "fake_quantize_per_channel_affine"
    scale, zero = torch.rand(6) + 0.1, torch.arange(6.0)
    inputs = [sample((2, 6, 3, 3), special=False), sample((3, 6, 5, 2), special=False)]
    inputs += [x.contiguous(memory_format=torch.channels_last) for x in inputs] + [inputs[0].transpose(0, 3)]
    want = [getattr(quantizers, function)(x, scale, zero, 1, -8, 7) for x in inputs]
    with patch("standin") as patched:
        for x, y in zip(inputs, want, strict=True):
            got = getattr(quantizers, function)(x, scale, zero, 1, -8, 7)
            assert_same_bits(got + 0.0, y + 0.0)
            assert got.stride() == y.stride()
        assert not any(r.passed_on for r in patched.replaced)
        with pytest.warns(UserWarning, match="scale must have 5 elements"), pytest.raises(RuntimeError, match="shape"):
            getattr(quantizers, function)(inputs[0][:, :5], scale, zero, 1, -8, 7)  # it is the original's error


def test_an_autograd_function_is_replaced():
    alpha = torch.tensor([0.3])
    leaves = X.clone().requires_grad_(), alpha.clone().requires_grad_()
    want = torch.autograd.grad(quantizers.FunLSQ.apply(*leaves, 0.1, -4, 3).square().sum(), leaves)
    original = quantizers.FunLSQ
    with patch("standin"):
        assert quantizers.FunLSQ is not original and issubclass(quantizers.FunLSQ, original)
        got = torch.autograd.grad(quantizers.FunLSQ.apply(*leaves, 0.1, -4, 3).square().sum(), leaves)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_loop_reaches_the_same_losses():
    want = loop.reconstruct()
    with patch("standin") as patched:
        got = loop.reconstruct()
        assert sum(r.calls for r in patched.replaced) == 60
    assert got == pytest.approx(want, rel=1e-3)
    assert want == loop.reconstruct()  # undone, where a module had imported the name too


def test_noise_repeats_itself_by_a_seed_and_is_drawn_anew():
    scale, grid = torch.tensor([0.25]), (torch.zeros(1), -8, 7)
    draws = []
    for _ in range(2):
        with patch("standin", seed=3):
            draws.append([quantizers.fake_noise_quantize_per_tensor(X, scale, *grid) for _ in range(2)])
    assert_same_bits(draws[0][0], draws[1][0])
    assert_same_bits(draws[0][1], draws[1][1])
    assert not torch.equal(*draws[0])


def test_calls_that_our_op_does_not_take_go_to_the_original():
    scale = torch.tensor([0.25], dtype=torch.float64)
    want = quantizers.fake_quantize_per_tensor_affine(X.double(), scale, 0, -8, 7)
    x, zero, learnable = X.clone().requires_grad_(), torch.ones(1, requires_grad=True), "learnable_per_tensor"
    with patch("standin") as patched:
        assert_same_bits(quantizers.fake_quantize_per_tensor_affine(X.double(), scale, 0, -8, 7), want)
        y = quantizers.fake_quantize_learnable_per_tensor_affine_training(x, torch.tensor([0.25]), zero, -8, 7, 0.5)
        y.sum().backward()
        passed = {r.name.rpartition(".")[2]: r.passed_on for r in patched.replaced if r.passed_on}
    assert passed == {
        f"fake_quantize_{learnable}_affine_training": {"its gradient of zero_point differs": 1},
        "fake_quantize_per_tensor_affine": {"x must be float32, bfloat16 or float16": 1},
    }
    assert zero.grad.item() == -0.25 * int(((X / 0.25).round() + 1 != ((X / 0.25).round() + 1).clamp(-8, 7)).sum())


def test_calls_keep_the_dtype_and_the_shape_that_the_original_gives():
    calls = [(X.bfloat16(), torch.tensor([0.25])), (X, torch.tensor([0.25]).double()), (X[0], torch.tensor([[0.25]]))]
    for x, scale in calls:
        want = quantizers.fake_quantize_per_tensor_affine(x, scale, 0, -8, 7)
        with patch("standin"):
            assert_same_bits(quantizers.fake_quantize_per_tensor_affine(x, scale, 0, -8, 7), want)


@pytest.mark.parametrize("change", [{"scale": torch.tensor([-0.25])}, {"zero_point": torch.tensor([0.5])}])
def test_values_that_our_op_refuses_are_computed_by_the_original_by_name(change):
    name = "fake_quantize_per_tensor_affine"
    good = {"x": X, "scale": torch.tensor([0.25]), "zero_point": torch.tensor([0.0]), "quant_min": -8, "quant_max": 7}
    want = getattr(quantizers, name)(**good | change)
    named = rf"standin\.quantizers\.{name}, patched by hdrq\.compat, is computed by the original: \w+ must be"
    for first in (good, good | change):  # compared with a good call, and not yet compared
        with patch("standin") as patched, pytest.warns(UserWarning, match=named) as warned:
            getattr(quantizers, name)(**first)
            assert_same_bits(getattr(quantizers, name)(**good | change), want)
            getattr(quantizers, name)(**good)
            assert len(warned) == 1  # once for each reason
            (record,) = (r for r in patched.replaced if r.name.endswith(name))
            assert record.calls - record.passed_on.total() == (2 if first is good else 1)


def test_a_kind_of_call_that_the_trial_did_not_see_is_compared_first():
    scale, zero = torch.rand(5) + 0.1, torch.ones(5)
    x = sample((5, 5, 5), special=False)
    detached = torch.ones(1, requires_grad=True)
    with patch("standin") as patched, pytest.warns(UserWarning, match="is computed by the original"):
        for axis in (0, 1, 1, 2):
            got = forks.fake_quantize_other_axis(x, scale, zero, axis, -8, 7)
            assert_same_bits(got + 0.0, quantizers.fake_quantize_per_channel_affine(x, scale, zero, -axis, -8, 7) + 0.0)
        y = forks.fake_quantize_of_a_fixed_zero(x.requires_grad_(), torch.tensor([0.25]), detached, -8, 7)
        y.sum().backward()
        passed = {r.name.rpartition(".")[2]: dict(r.passed_on) for r in patched.replaced if r.passed_on}
    assert passed == {
        "fake_quantize_other_axis": {"its values differ": 3},
        "fake_quantize_of_a_fixed_zero": {"it gives zero_point no gradient": 1},
    }
    assert detached.grad is None


def test_defaults_and_keywords_alone():
    want = forks.fake_quantize_keywords(X, delta=torch.tensor(0.25))
    with patch("standin") as patched:
        got = forks.fake_quantize_keywords(X, delta=torch.tensor(0.25))
        (record,) = (r for r in patched.replaced if r.name.endswith("keywords"))
        assert (record.calls, record.passed_on.total()) == (1, 0)
    assert_same_bits(got + 0.0, want + 0.0)


def test_a_factor_may_move_the_scale_by_its_last_bit():
    scale = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1
    with patch("standin") as patched:
        for s in scale.split(1):
            x = sample((64, 640), special=False).requires_grad_()
            grid = torch.zeros(1), -8, 7, 1e-3 / 3
            quantizers.fake_quantize_learnable_per_tensor_affine_training(x, s.requires_grad_(), *grid)
        assert all(not r.passed_on for r in patched.replaced)


def test_a_pass_that_checkpointing_runs_again_is_refused():
    from torch.utils.checkpoint import checkpoint

    x, scale = X.clone().requires_grad_(), torch.tensor([0.25])
    with patch("standin"):
        y = checkpoint(quantizers.fake_noise_quantize_per_tensor, x, scale, 0, -8, 7, use_reentrant=False)
        with pytest.raises(RuntimeError, match="noise must not be drawn inside a backward pass"):
            y.sum().backward()


def test_deterministic_calls_may_be_checkpointed():
    from torch.utils.checkpoint import checkpoint

    def loss(x):
        return quantizers.fake_quantize_per_tensor_affine(x.sin(), torch.tensor([0.25]), 0, -8, 7).square().sum()

    want = torch.autograd.grad(loss(x := X.clone().requires_grad_()), x)
    with patch("standin"):
        got = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    torch.testing.assert_close(got, want)


def test_compiled_calls_are_the_originals():
    compiled = torch.compile(lambda x, s: quantizers.fake_quantize_per_tensor_affine(x, s, 0, -8, 7), backend="eager")
    with patch("standin") as patched:
        for _ in range(3):
            compiled(X, torch.tensor([0.25]))
        assert sum(r.calls for r in patched.replaced) == 0
    torch._dynamo.reset()


def test_what_came_meanwhile_is_undone_too():
    late = types.ModuleType("late")
    sys.modules["late"] = late
    try:
        with patch("standin"):
            late.quantize = quantizers.fake_quantize_per_tensor_affine

            class Squared(quantizers.FunLSQ):
                @staticmethod
                def forward(ctx, weight):
                    return weight.square()

            assert Squared.apply(torch.tensor(3.0)) == 9
        assert late.quantize is quantizers.fake_quantize_per_tensor_affine is loop.fake_quantize_per_tensor_affine
        assert "_hdrq_patched" not in vars(late.quantize)
        assert Squared.apply(torch.tensor(3.0)) == 9
    finally:
        del sys.modules["late"]


def test_a_function_is_replaced_wherever_it_was_imported():
    late = types.ModuleType("late")
    late.quantize = original = quantizers.fake_quantize_per_tensor_affine
    sys.modules["late"] = late
    try:
        with patch("standin.quantizers"):
            assert late.quantize is quantizers.fake_quantize_per_tensor_affine is not original
        assert late.quantize is original
    finally:
        del sys.modules["late"]


def test_a_function_may_read_its_module(monkeypatch):
    from standin import states

    args = X, torch.tensor([0.25]), 0, -8, 7
    with patch("standin"), pytest.warns(UserWarning, match="its values differ"):
        assert not torch.equal(states.fake_quantize_while_enabled(*args), X)
        monkeypatch.setattr(states, "ENABLED", False)
        assert torch.equal(states.fake_quantize_while_enabled(*args), X)


def test_equal_scales_at_first_do_not_hide_the_axis():
    x, zero = sample((8, 8, 8), special=False), torch.zeros(8)
    with patch("standin"), pytest.warns(UserWarning, match="its values differ"):
        forks.fake_quantize_other_axis(x, torch.full((8,), 0.2), zero, 2, -8, 7)
        scale = torch.rand(8) + 0.1
        got = forks.fake_quantize_other_axis(x, scale, zero, 2, -8, 7)
    assert_same_bits(got + 0.0, quantizers.fake_quantize_per_channel_affine(x, scale, zero, -2, -8, 7) + 0.0)


def test_an_object_that_holds_ours_calls_the_original_after_undo():
    with patch("standin") as patched:
        held = quantizers.fake_quantize_per_tensor_affine
        held(X, torch.tensor([0.25]), 0, -8, 7)
    held(X, torch.tensor([0.25]), 0, -8, 7)
    assert sum(r.calls for r in patched.replaced) == 1


def test_a_reason_is_one_whatever_the_values(recwarn):
    with patch("standin") as patched:
        for scale in (-0.1, -0.2, -0.3):
            quantizers.fake_quantize_per_tensor_affine(X, torch.tensor([scale]), 0, -8, 7)
        (record,) = (r for r in patched.replaced if r.name.endswith("quantizers.fake_quantize_per_tensor_affine"))
    assert dict(record.passed_on) == {"scale must be positive and finite": 3} and len(recwarn) == 1


def test_patching_twice_and_undoing_out_of_order():
    original = quantizers.fake_quantize_per_tensor_affine
    first = patch("standin")
    with pytest.raises(ValueError, match="must not be patched twice: undo the first patch"):
        patch("standin")
    ours = quantizers.fake_quantize_per_tensor_affine
    quantizers.fake_quantize_per_tensor_affine = original
    with pytest.raises(RuntimeError, match="must be as the patch left it to be undone"):
        first.undo()
    quantizers.fake_quantize_per_tensor_affine = ours
    first.undo()
    first.undo()
    assert quantizers.fake_quantize_per_tensor_affine is loop.fake_quantize_per_tensor_affine is original


def test_a_package_must_be_imported():
    with pytest.raises(ValueError, match="package must be imported before it is patched, got 'no_such_package'"):
        patch("no_such_package")
    with pytest.raises(TypeError, match="seed must be an int"):
        patch("standin", seed=0.5)


def test_nothing_of_the_random_state_is_used_up():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    patch("standin").undo()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert forks.quantize_names("ba") == ["a", "b"] and hdrq.compat.patch is patch
