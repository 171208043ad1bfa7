"""The merge of HDRQ's released code, written here from a description of what it does, beside ``preset="official"``."""

import numpy as np
import pytest
import torch
from networks import quantized

import hdrq
from hdrq.backends.reference.noise import unit_noise
from hdrq.merging.layers import LayerInputs, merge_layer
from hdrq.merging.settings import MergeSettings
from hdrq.quantizers.layers import input_quantizers, quantized_layers


class Released:
    """One layer of two models, merged as the released code does it: on floats, each model with one scale."""

    def __init__(self, codes, scales):
        self.scales = scales
        self.weights = [c.float() * s for c, s in zip(codes, scales, strict=True)]
        self.midpoint = (self.weights[0] + self.weights[1]) / 2
        self.step = (scales[0] + scales[1]) / 2
        self.odd = (codes[0].int() + codes[1].int()) % 2 == 1
        first, second = (w / s for w, s in zip(self.weights, scales, strict=True))
        self.seen_as_odd = (first + second) % 2 == 1  # its own test, which misses some: 7·s / s need not be 7

    def draw(self, noises, odd):
        """The floats that it stores for one draw."""
        noisy = [w + torch.where(odd, n, 0.0) * s for w, n, s in zip(self.weights, noises, self.scales, strict=True)]
        return (noisy[0] + noisy[1]) / 2

    def integers(self, stored):
        """What becomes of them at inference, but for the clamp."""
        return torch.round(stored / self.step)

    def cosines(self, stored):
        """Absolute values, with 0 for a step of nothing, of the integers before the clamp.

        Sums are float64, so that every machine finds the same; float32 is for the comparison.
        """
        taken, found = self.integers(stored) * self.step, []
        for weight in self.weights:
            step, wanted = (taken - weight).double(), (self.midpoint - weight).double()
            length = step.norm() * wanted.norm()
            found.append(((step * wanted).sum() / length).abs() if length > 0 else length)
        return torch.stack(found)

    def draws(self, noises, odd):
        """The integers of every draw, and its cosines."""
        stored = [self.draw(each, odd) for each in noises]
        return torch.stack([self.integers(each) for each in stored]), torch.stack([self.cosines(s) for s in stored])


def kept(cosines):
    """The first draw, until both cosines of another are higher, in float32, than those of the one kept."""
    best = 0
    for draw, found in enumerate(cosines.float()):
        best = draw if (found > cosines[best].float()).all() else best
    return best


def drawn(seed, stream, shape, draws=100):
    """The noise of each draw on both models, as :func:`hdrq.ops.merge` has it."""
    states = ([np.array([seed, stream + k, d]) for k in range(2)] for d in range(draws))
    return [[torch.from_numpy(unit_noise(tuple(shape), state, None)) for state in pair] for pair in states]


def pair(bits, apart, shape=(32, 64), seed=0):
    generator = torch.Generator().manual_seed(seed + bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    first = torch.randn(shape, generator=generator) * high / 2
    second = first + torch.randn(shape, generator=generator)  # a step apart, as two models of one source are
    codes = [c.round().clamp(low, high).to(torch.int8) for c in (first, second)]
    scale = torch.rand(1, generator=generator) * 0.05 + 0.02
    return codes, [scale, scale * apart]


def official(codes, scales, bits, seed=0):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ranges, shape = [(low, high)] * 2, codes[0].shape
    packed = [hdrq.ops.pack(c) for c in codes] if bits <= 4 else codes
    layer = LayerInputs("layer", 1, packed, scales, None, ranges, low, high, None, shape, (0.5, 0.5))
    merged = merge_layer(layer, MergeSettings.of(2, "official", seed=seed))
    return merged._replace(codes=hdrq.ops.unpack(merged.codes, shape)) if layer.packed else merged


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("apart", [1.0, 1.01, 1.3])
def test_a_layer_is_merged_as_the_released_code_does(bits, apart):
    codes, scales = pair(bits, apart)
    ours, released, noises = official(codes, scales, bits), Released(codes, scales), drawn(0, 64, codes[0].shape)
    integers, cosines = released.draws(noises, released.odd)
    draw = int(ours.draw)
    assert torch.equal(ours.scale, released.step)
    torch.testing.assert_close(ours.similarity, cosines, rtol=0, atol=1e-7)
    assert draw == kept(cosines) and (draw > 0) == (apart == 1.3)
    assert torch.equal(ours.codes.float(), integers[draw])  # the clamp finds nothing to do
    assert torch.equal(integers[:, ~released.odd], integers[:1, ~released.odd].expand(100, -1))
    seen = released.integers(released.draw(noises[draw], released.seen_as_odd))
    missed = released.odd & ~released.seen_as_odd
    assert not (released.seen_as_odd & ~released.odd).any()
    assert torch.equal(seen[~missed], ours.codes[~missed].float())


def test_a_model_is_merged_layer_by_layer_and_nothing_is_forgotten():
    models = [quantized(seed, {"*": "W4A4"}) for seed in range(2)]
    merged = hdrq.merge(models, preset="official", seed=3)
    parts, draws = [quantized_layers(model) for model in models], set()
    for i, (name, layer) in enumerate(quantized_layers(merged).items()):
        quantizers = [part[name].weight_quantizer for part in parts]
        codes = [q.codes(part[name].latent) for q, part in zip(quantizers, parts, strict=True)]
        released = Released(codes, [q.scale for q in quantizers])
        integers, cosines = released.draws(drawn(3, 64 * i, codes[0].shape), released.odd)
        draws.add(kept(cosines))
        assert torch.equal(layer.weight_quantizer.codes(layer.latent).float(), integers[kept(cosines)])
        assert torch.equal(layer.weight_quantizer.scale, released.step)
    assert len(draws) > 1  # each layer has its own choice
    states = [model.state_dict() for model in (*models, merged)]
    scales = [f"{name}.input_quantizer.scale" for name in input_quantizers(merged)]
    for name in ("gain", "a.bias", "head.bias", *scales):
        first, second, mean = (state[name] for state in states)
        torch.testing.assert_close(mean, (first + second) / 2)


def test_an_odd_sum_that_the_float_test_misses_has_noise_all_the_same():
    codes, scales = pair(3, 1.0)
    released = Released(codes, scales)
    missed = released.odd & ~released.seen_as_odd
    assert missed.any()
    ways = {official(codes, scales, 3, seed).codes[missed].tolist()[0] for seed in range(20)}
    assert len(ways) == 2


def test_cosines_within_a_millionth_are_equal():
    codes, scales = pair(8, 1.0, seed=2)
    ours, released = official(codes, scales, 8), Released(codes, scales)
    _, cosines = released.draws(drawn(0, 64, codes[0].shape), released.odd)
    other = kept(cosines)
    rise = cosines[other] - cosines[int(ours.draw)]
    assert other != int(ours.draw) and (rise > 0).all() and rise.min() < 1e-6


def test_a_step_of_nothing_is_aligned():
    """Two models that differ in four weights: a draw that gives one of them as it was is the best, not the worst."""
    codes = [torch.zeros(4, dtype=torch.int8), torch.ones(4, dtype=torch.int8)]
    scales = [torch.tensor([0.25])] * 2
    ours, released = official(codes, scales, 4), Released(codes, scales)
    integers, cosines = released.draws(drawn(0, 64, (4,)), released.odd)
    assert ours.codes.unique().numel() == 1 and ours.similarity[ours.draw].tolist() == [1.0, 1.0]
    assert cosines[int(ours.draw)].min() == 0
    assert kept(cosines) == 0 and integers[0].unique().numel() == 2
