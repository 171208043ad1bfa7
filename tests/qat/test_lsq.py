"""LSQ on a whole model: its gradients, its scales, and what a trained model is."""

import math

import pytest
import torch
from helpers import assert_same_bits, same, state
from networks import CALIBRATION, Block, data, lively, net
from torch import nn

import hdrq
from hdrq import qat
from hdrq.quantizers.layers import quantized_layers


def prepared(model=None, **options):
    return qat.prepare(model or net(), CALIBRATION, **{"bits": "W3A3", **options})


def loss_of(model, x=CALIBRATION[:8]):
    return (model(x) * torch.linspace(-1, 1, 6)).square().mean()


@pytest.mark.parametrize("name", ["3.weight", "3.input"])
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"per_channel": True, "grad_factor": "channel"}])
def test_scale_gradient_is_that_of_the_surrogate_with_the_residual_held(name, options):
    model = prepared(**options)
    quantizer = qat.quantizers(model)[name]
    layer = quantized_layers(model)["3"].module
    v = (quantized_layers(model)["3"].latent if name == "3.weight" else data(5, 12, 4, 4).abs()).detach()
    upstream = data(*v.shape, seed=1).double()
    quantizer.train().scale.data.mul_(0.3)  # so that elements are clipped
    (quantizer(v) * upstream.float()).sum().backward()

    s = quantizer.scale.detach().double()
    wide = (lambda t: t.reshape(-1, 1, 1, 1)) if len(s) > 1 else (lambda t: t)
    ratio = v.double() / wide(s)
    residual = ratio.clamp(quantizer.qmin, quantizer.qmax).round() - ratio.clamp(quantizer.qmin, quantizer.qmax)

    def surrogate(scale):
        return ((v.double() / wide(scale)).clamp(quantizer.qmin, quantizer.qmax) + residual) * wide(scale)

    count = v[0].numel() if name == "3.input" or options.get("grad_factor") == "channel" else v.numel()
    factor = 1 / math.sqrt(count * quantizer.qmax)
    for k in range(len(s)):
        step = torch.zeros_like(s)
        step[k] = 1e-7 * s[k]
        slope = ((surrogate(s + step) - surrogate(s - step)) * upstream).sum() / (2 * step[k])
        assert float(quantizer.scale.grad[k]) == pytest.approx(float(slope) * factor, rel=2e-4, abs=1e-6)
    assert (ratio > quantizer.qmax).any() and (name == "3.input" or (ratio < quantizer.qmin).any())
    assert layer.weight.shape == quantized_layers(model)["3"].latent.shape


def test_weight_passes_gradient_where_it_is_not_clamped_before_rounding():
    quantizer = qat.quantizers(prepared())["3.weight"]
    s, top = float(quantizer.scale), quantizer.qmax
    v = torch.tensor([top + 0.4, top - 0.4, quantizer.qmin - 0.4]).mul(s).requires_grad_()
    quantizer(v).sum().backward()
    assert v.grad.tolist() == [0, 1, 0]  # 0.4 beyond the range rounds into it, and is outside all the same


def test_scales_start_by_the_papers_rule():
    model = prepared(per_channel=True)
    layer = quantized_layers(model)["3"]
    want = 2 * layer.latent.detach().abs().mean((1, 2, 3)) / math.sqrt(layer.weight_quantizer.qmax)
    torch.testing.assert_close(layer.weight_quantizer.scale.detach(), want)
    first = qat.quantizers(model)["0.input"]
    torch.testing.assert_close(first.scale.detach(), 2 * CALIBRATION.abs().mean().reshape(1) / math.sqrt(127))


def test_range_search_gives_the_scales_of_quantize():
    model = prepared(init="search")
    other = hdrq.quantize(
        net(), CALIBRATION, "rtn", bits="W3A3", activation_placement="input", affine_activations=False
    )
    for ours, theirs in zip(qat.quantizers(model).values(), qat.quantizers(other).values(), strict=True):
        assert_same_bits(ours.scale, theirs.scale)
    with torch.no_grad():
        assert_same_bits(model(CALIBRATION), other(CALIBRATION))


@pytest.mark.parametrize(
    ("edges", "widths"), [(None, [8, 3, 3, 8]), (8, [8, 3, 3, 8]), ("same", [3, 3, 3, 3]), ("float", [3, 3])]
)
def test_policies_of_the_first_and_last_layer(edges, widths):
    layers = quantized_layers(prepared(edges=edges)).values()
    assert [layer.weight_quantizer.qmax.bit_length() + 1 for layer in layers] == widths


def test_no_scale_is_used_below_its_floor():
    model = prepared().train()
    for quantizer in qat.quantizers(model).values():
        quantizer.scale.data.neg_()  # as an optimizer may leave it
    assert len(qat.lsq.collapsed(model)) == 8
    loss_of(model).backward()  # the op itself refuses a scale that is not positive
    assert all((q.scale == q.floor).all() and (q.scale > 0).all() for q in qat.quantizers(model).values())


def test_a_gradient_does_not_depend_on_how_a_batch_is_cut():
    whole, parts = prepared().train(), prepared().train()
    x = data(8, 3, 8, 8)
    whole(x).sum().backward()
    for part in x.split(2):
        parts(part).sum().backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=2e-4)


def test_a_trained_model_is_a_checkpoint_like_any_other(tmp_path):
    models = []
    for seed in range(2):
        model = prepared(per_channel=True).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, CALIBRATION[8 * step + seed :][:8]).backward()
            optimizer.step()
        with torch.no_grad():
            before = model.eval()(CALIBRATION)
        models.append(qat.convert(model))
        assert_same_bits(model(CALIBRATION), before)  # what was evaluated while it trained is what is saved
        hdrq.save(model, tmp_path / f"{seed}.safetensors")
        loaded = hdrq.load(tmp_path / f"{seed}.safetensors", net())
        assert_same_bits(loaded(CALIBRATION), before)
        assert not any(p.requires_grad for p in model.parameters())
    merged = hdrq.merge(models)
    assert same(state(merged), state(hdrq.merge([hdrq.load(tmp_path / f"{k}.safetensors", net()) for k in range(2)])))
    assert not same(state(models[0]), state(models[1]))


def test_batchnorm_is_folded_or_trains_and_stays(tmp_path):
    assert not [m for m in prepared().modules() if isinstance(m, nn.BatchNorm2d)]
    model = prepared(batchnorm="keep").train()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    loss_of(model).backward()
    assert norm.weight.grad is not None and not torch.equal(norm.running_mean, before)
    with torch.no_grad():
        before = model.eval()(CALIBRATION)
    hdrq.save(qat.convert(model), tmp_path / "kept.safetensors")
    assert_same_bits(hdrq.load(tmp_path / "kept.safetensors", net())(CALIBRATION), before)


def test_what_was_frozen_stays_frozen_and_the_model_given_as_it_was():
    model = net()
    model[3].weight.requires_grad_(False)
    before = state(model)
    trained = prepared(model)
    frozen = {n for n, p in trained.named_parameters() if not p.requires_grad}
    assert frozen == {"3.parametrizations.weight.original", "3.bias"}  # its bias came of folding into it
    assert same(state(model), before)


def test_a_residual_is_read_by_several_layers():
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Block(), nn.Flatten(), nn.Linear(256, 3)))
    trained = qat.prepare(model, CALIBRATION, bits="W4A4").train()
    trained(CALIBRATION[:4]).sum().backward()
    shared = [n for n in qat.quantizers(trained) if n.endswith(".input") and n.startswith("2")]
    assert shared == ["2.first.input", "2.second.input"]  # the shortcut reads what the first layer reads


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"init": "paper"}, "init must be one of 'lsq', 'search', got 'paper'"),
        (None, {"edges": 4}, "edges must be one of 8, 'float', 'same', got 4"),
        (None, {"edges": 8, "bits": {"*": "W4A4"}}, "edges must be left out where bits has patterns, .* got 8"),
        (None, {"iterations": 5}, "knob must be one of .* got 'iterations'"),
        (None, {"affine_activations": True}, "affine_activations must be False with init=\"lsq\""),
        (lambda m: m.half(), {}, "model must be float32 to be trained, got half types in 0.weight"),
        (lambda m: m.train(), {}, "model must be in evaluation mode"),
        (lambda m: m[3].weight.data.zero_(), {}, "scale of 3.weight must be positive, got 1 of 1 that are zero"),
        (lambda m: m[5].register_forward_hook(lambda *a: a[-1] * 0), {}, "scale of 6.input must be positive, got 1"),
    ],
)  # fmt: skip
def test_refusals(change, options, message):
    model = net()
    if change is not None:
        change(model)
    calibration = CALIBRATION.half() if model[0].weight.dtype == torch.float16 else CALIBRATION
    with pytest.raises(ValueError, match=message):
        qat.prepare(model, calibration, **options)


def test_convert_refuses_what_is_no_model_of_ours_or_diverged():
    with pytest.raises(ValueError, match=r"model must be prepared by hdrq\.qat\.prepare, got a plain Sequential"):
        qat.convert(net())
    model = prepared()
    qat.quantizers(model)["3.weight"].scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"scale of 3\.weight must be finite to be converted"):
        qat.convert(model)
