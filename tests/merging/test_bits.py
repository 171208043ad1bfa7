"""Models that differ in bits, and weights that do not average: into what range the result goes."""

import pytest
import torch
from helpers import merged_content, same, state
from networks import SAMPLES, quantized

import hdrq
from hdrq.merging.files import merge_files
from hdrq.merging.models import states_of
from hdrq.quantizers.layers import input_quantizers, quantized_layers


@pytest.fixture(scope="module")
def mixed():
    """W4A4 and W8A8; the first and the last layer have 8 bits in both."""
    return [quantized(0), quantized(1, bits="W8A8")]


def values(model):
    return {name: layer.latent.detach() for name, layer in quantized_layers(model).items()}


@pytest.mark.parametrize("bits", ["W8A8", "W6A5"])
def test_the_result_has_the_bits_asked_for(mixed, bits):
    merged = hdrq.merge(mixed, bits=bits)
    width, levels = int(bits[1]), 2 ** int(bits[3])
    quantizer = quantized_layers(merged)["b"].weight_quantizer
    assert (quantizer.qmin, quantizer.qmax) == (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    parts = [quantized_layers(model)["b"] for model in mixed]
    want = hdrq.ops.merge(
        [p.weight_quantizer.codes(p.latent) for p in parts],
        [p.weight_quantizer.scale for p in parts],
        quantizer.qmin,
        quantizer.qmax,
        hdrq.rng_state(0, stream=64),
        ranges=[(-8, 7), (-128, 127)],
    )
    assert torch.equal(quantizer.codes(quantized_layers(merged)["b"].latent), want.codes)
    reads = [input_quantizers(model)["b"] for model in (*mixed, merged)]
    assert reads[2].qmax - reads[2].qmin + 1 == levels
    spans = [float(q.scale) * (q.qmax - q.qmin + 1) for q in reads]
    assert spans[2] == pytest.approx((spans[0] + spans[1]) / 2)  # the range that is held, not the step, is averaged
    assert reads[2].qmin * float(reads[2].scale) == pytest.approx(
        sum(q.qmin * float(q.scale) for q in reads[:2]) / 2, abs=float(reads[2].scale)
    )
    first = quantized_layers(merged)["a"].weight_quantizer
    assert (first.qmin, first.qmax) == (-128, 127)
    assert merged(SAMPLES).isfinite().all()


def test_files_give_what_memory_gives(mixed, tmp_path):
    for k, model in enumerate(mixed):
        hdrq.save(model, tmp_path / str(k))
    merge_files([tmp_path / "0", tmp_path / "1"], tmp_path / "merged", bits="W6A6")
    hdrq.save(hdrq.merge(mixed, bits="W6A6"), tmp_path / "saved")
    assert merged_content(tmp_path / "merged") == merged_content(tmp_path / "saved")
    loaded = hdrq.load(tmp_path / "merged", quantized(2).cpu() and _plain())
    assert same(state(loaded), state(hdrq.merge(mixed, bits="W6A6")))


def _plain():
    from networks import mergeable

    return mergeable(0)


def test_without_bits_they_are_refused(mixed):
    with pytest.raises(ValueError, match=r"b: weight range .* bits says what the result has"):
        hdrq.merge(mixed)


def test_a_range_that_does_not_hold_the_mean_is_warned_of(mixed):
    with pytest.warns(UserWarning, match=r"b: \d+% of the merged weights are clipped to \[-4, 3\]"):
        hdrq.merge(mixed, bits="W3A4")


@pytest.mark.parametrize("rule", ["systematic", "requantize"])
def test_a_difference_is_added(models, rule):
    """A + ½·(B − C), as its numbers say."""
    with pytest.warns(UserWarning, match="clipped") if rule == "systematic" else _nothing():
        merged = hdrq.merge(models, weights=(1.0, 0.5, -0.5), extrapolate=True, rule=rule)
    parts, got = [values(m) for m in models], values(merged)
    for name, value in got.items():
        want = parts[0][name] + 0.5 * (parts[1][name] - parts[2][name])
        step = float(quantized_layers(merged)[name].weight_quantizer.scale.max())
        q = quantized_layers(merged)[name].weight_quantizer
        inside = (want > q.qmin * step) & (want < q.qmax * step)
        assert inside.float().mean() > 0.5
        assert (value - want)[inside].abs().max() < 1.001 * step


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_weights_of_any_sum_have_their_range_searched(models):
    merged = hdrq.merge(models[:2], weights=(1.0, 1.0), extrapolate=True, rule="requantize")
    for name, value in values(merged).items():
        want = values(models[0])[name] + values(models[1])[name]
        assert (value - want).norm() < 0.2 * want.norm()
    assert len(states_of([merged])) == 1
