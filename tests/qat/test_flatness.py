"""Two-pass steps: where the second gradient is taken, and that nothing else of them stays."""

import copy

import pytest
import torch
from helpers import assert_same_bits, same, state
from networks import CALIBRATION, data, net
from torch import nn

from hdrq import qat
from hdrq.quantizers.layers import quantized_layers

LABELS = torch.arange(96) % 6
KINDS = [qat.SAM, qat.ASAM, qat.SAGM]


def prepared(**options):
    return qat.prepare(net(), CALIBRATION, **{"bits": "W3A3", **options}).train()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **options})


def closure_of(model, step=0, parts=1):
    def closure():
        total = 0.0
        for x, y in zip(CALIBRATION[16 * step :][:16].chunk(parts), LABELS[16 * step :][:16].chunk(parts), strict=True):
            loss = nn.functional.cross_entropy(model(x), y) / parts
            loss.backward()
            total = total + loss.detach()
        return total

    return closure


def trained(optimizer_of, model, steps=3, parts=1):
    optimizer = optimizer_of(model)
    for step in range(steps):
        if isinstance(optimizer, qat.SAM):
            optimizer.step(closure_of(model, step, parts))
        else:
            optimizer.zero_grad()
            closure_of(model, step, parts)()
            optimizer.step()
    return state(model)


class Seen:
    """What a closure finds at each of its passes."""

    def __init__(self, model):
        self.model, self.parameters, self.weights, self.losses = model, [], [], []

    def __call__(self, closure):
        def watched():
            self.parameters.append([p.detach().clone() for p in self.model.parameters()])
            self.weights.append([layer.module.weight.detach() for layer in quantized_layers(self.model).values()])
            self.losses.append(closure())
            return self.losses[-1]

        return watched


def difference(a, b):
    return torch.cat([(x.double() - y.double()).flatten() for x, y in zip(a, b, strict=True)])


def test_gradient_of_sam_on_a_quadratic():
    a = data(5, 5).double()
    a, start, rho = a @ a.T, data(5, seed=1).double(), 0.3
    theta = nn.Parameter(start.clone())
    model = nn.ParameterList([theta])

    def closure():
        loss = 0.5 * theta @ a @ theta
        loss.backward()
        return loss

    g = a @ start
    at = {
        qat.SAM: a @ (start + rho * g / g.norm()),
        qat.ASAM: a @ (start + rho * start**2 * g / (start.abs() * g).norm()),
        qat.SAGM: 0.5 * (g + a @ (start + (rho / g.norm() - 0.001) * g)),
    }
    for kind, want in at.items():
        theta.data.copy_(start)
        loss = kind(torch.optim.SGD([theta], 0.1), model, rho=rho).step(closure)
        torch.testing.assert_close(theta.detach(), start - 0.1 * want, rtol=1e-10, atol=1e-10)
        assert float(loss) == pytest.approx(float(0.5 * start @ a @ start))


@pytest.mark.parametrize("perturb", ["latent", "quantized"])
@pytest.mark.parametrize("scales", [False, True])
def test_the_second_pass_is_rho_away(perturb, scales):
    model = prepared()
    seen = Seen(model)
    optimizer = qat.SAM(sgd(model), model, rho=0.3, perturb=perturb, perturb_scales=scales)
    optimizer.step(seen(closure_of(model)))
    names = [name for name, _ in model.named_parameters()]
    moved = {n for n, a, b in zip(names, *seen.parameters, strict=True) if not torch.equal(a, b)}
    latents = {n for n in names if n.endswith("original")}
    of_scales = {n for n in names if n.endswith("scale")}
    assert moved == set(names) - (set() if scales else of_scales) - (latents if perturb == "quantized" else set())
    far = difference(*seen.parameters)
    if perturb == "quantized" and not scales:  # with new scales, weights are rounded anew as well
        far = torch.cat([far, difference(*seen.weights)])
    if perturb == "latent" or not scales:
        assert float(far.norm()) == pytest.approx(0.3, rel=1e-4)


def test_a_movement_of_quantized_weights_follows_their_gradient():
    model = prepared()
    layer = quantized_layers(model)["3"]
    handles, gradients = [], []

    def keep(module, args, output):
        output.register_hook(gradients.append)

    handles.append(layer.weight_quantizer.register_forward_hook(keep))
    seen = Seen(model)
    qat.SAM(sgd(model), model, perturb="quantized").step(seen(closure_of(model)))
    index = list(quantized_layers(model)).index("3")
    moved = seen.weights[1][index] - seen.weights[0][index]
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(), gradients[0].flatten(), 0)
    assert float(cosine) > 0.9999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("options", [{}, {"batchnorm": "keep"}])
def test_no_movement_is_plain_lsq_to_the_bit(kind, parts, options):
    none = {"rho": 0.0, **({"alpha": 0.0} if kind is qat.SAGM else {})}
    plain = trained(sgd, prepared(**options), parts=parts)
    assert same(plain, trained(lambda m: kind(sgd(m), m, **none), prepared(**options), parts=parts))
    assert not same(plain, trained(lambda m: kind(sgd(m), m), prepared(**options), parts=parts))


def test_dropout_has_one_mask_for_both_passes():
    class Dropped(nn.Sequential):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    def run(optimizer_of):
        torch.manual_seed(3)
        return trained(optimizer_of, Dropped(*net()).train())

    assert same(run(sgd), run(lambda m: qat.SAM(sgd(m), m, rho=0.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_step_parameters_are_what_they_were_and_the_update(kind):
    model = prepared(batchnorm="keep")
    for p in model.parameters():
        p.data.mul_(1 + 1e-3 * torch.rand_like(p))  # numbers that adding and taking away again would change
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = kind(sgd(model, momentum=0, weight_decay=0), model, rho=0.7)
    optimizer.step(closure_of(model))
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, old.add(p.grad, alpha=-0.05))

    other = prepared(batchnorm="keep")
    for p, old in zip(other.parameters(), before, strict=True):
        p.data.copy_(old)
    closure_of(other)()
    batchnorm = {n: b for n, b in other.named_buffers() if "running" in n or "batches" in n}
    assert batchnorm
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in batchnorm.items())  # moved by one pass


@pytest.mark.parametrize("perturb", ["latent", "quantized"])
def test_a_pass_that_fails_leaves_the_parameters(perturb):
    model, calls = prepared(), []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("no more")
        return closure_of(model)()

    before, weights = state(model), [layer.module.weight.detach() for layer in quantized_layers(model).values()]
    with pytest.raises(KeyError):
        qat.SAM(sgd(model), model, perturb=perturb, rho=1.0).step(closure)
    assert same(before, state(model))
    for layer, weight in zip(quantized_layers(model).values(), weights, strict=True):
        assert_same_bits(layer.module.weight, weight)


@pytest.mark.parametrize("perturb", ["latent", "quantized"])
def test_parts_of_a_batch_make_the_step_of_the_whole(perturb):
    whole = trained(lambda m: qat.SAGM(sgd(m), m, rho=0.5, perturb=perturb), prepared(), steps=1)
    parts = trained(lambda m: qat.SAGM(sgd(m), m, rho=0.5, perturb=perturb), prepared(), steps=1, parts=4)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)


def test_autocast_around_a_step_is_autocast_inside_it():
    def run(outside):
        model = net().train()
        optimizer = qat.SAM(sgd(model), model, rho=0.5)
        inner = closure_of(model)

        def closure():
            with torch.autocast("cpu", torch.bfloat16):
                return inner()

        if outside:
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step(inner)
        else:
            optimizer.step(closure)
        return state(model)

    assert same(run(False), run(True))  # a cache of casts would show the second pass what the first had


def test_a_scaler_changes_nothing_but_leaves_out_what_overflows():
    def run(kind, scaler=None, spoil=False):
        model = prepared()
        optimizer = kind(sgd(model), model, scaler=scaler, perturb_scales=True)
        calls = []

        def closure():
            calls.append(None)
            loss = nn.functional.cross_entropy(model(CALIBRATION[:16]), LABELS[:16])
            loss = loss * torch.inf if spoil else loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        optimizer.step(closure)
        return state(model), len(calls)

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    for kind in (qat.SAM, lambda *a, **o: qat.SAGM(*a, alpha=0.5, **o)):
        assert same(run(kind)[0], run(kind, scaler())[0])
    made = scaler()
    after, calls = run(qat.SAM, made, spoil=True)
    assert same(after, state(prepared())) and calls == 1 and made.get_scale() == 2.0**9


def test_schedules_and_state_are_the_wrapped_optimizers():
    model = prepared()
    optimizer = qat.SAM(sgd(model), model)
    torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.025
    optimizer.step(closure_of(model))
    kept, weights = copy.deepcopy(optimizer.state_dict()), state(model)
    optimizer.step(closure_of(model, 1))
    want = state(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(kept)
    optimizer.step(closure_of(model, 1))
    assert same(want, state(model))


def test_refusals():
    model = prepared()
    optimizer = qat.SAM(sgd(model), model)
    with pytest.raises(TypeError, match=r"closure must be a function .* for it runs twice, got NoneType"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"closure must call backward on a loss .* got no gradient"):
        optimizer.step(lambda: model(CALIBRATION[:4]).sum())
    with pytest.raises(TypeError, match=r"optimizer must be one of torch's, got SAM, which is wrapped already"):
        qat.SAGM(optimizer, model)
    with pytest.raises(TypeError, match=r"that steps without a closure, got LBFGS"):
        qat.SAM(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(TypeError, match=r"model must be the torch.nn.Module .* got list"):
        qat.SAM(sgd(model), [])
    with pytest.raises(ValueError, match="perturb must be one of 'latent', 'quantized', got 'both'"):
        qat.SAM(sgd(model), model, perturb="both")
    with pytest.raises(ValueError, match=r"rho must be finite and in \[0, inf\], got -1"):
        qat.SAM(sgd(model), model, rho=-1)
    with pytest.raises(ValueError, match='model must have quantizers for perturb="quantized", got none'):
        qat.SAM(sgd(net().train()), net(), perturb="quantized")
