"""Learning rates: their schedules, and steps that follow the size of what they move."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from networks import CALIBRATION, learn, net
from torch import nn

import hdrq
from hdrq.methods.post_training import fold
from hdrq.methods.reconstruct.schedule import schedule
from hdrq.quantizers.layers import quantized_layers
from hdrq.recipes import recipe


def test_schedule():
    plan = recipe("qdrop", iterations=100, weight_lr=1e-3, bias_lr=0.5)
    weights, activations, beta, rounding, biases = schedule(plan).T
    assert (weights == 1e-3).all() and activations[0] == pytest.approx(4e-5) and activations[50] == pytest.approx(2e-5)
    assert biases[0] == 0.5 and biases[50] == pytest.approx(0.25)
    assert not rounding[:20].any() and (rounding[20:] == 0.01).all()
    assert (beta[:21] == 20).all() and beta[60] == pytest.approx(11) and beta[99] == pytest.approx(2.225)
    cosine = schedule(replace(plan, beta_schedule="cosine"))[:, 2]
    assert cosine[60] == pytest.approx(11) and cosine[40] == pytest.approx(20 - 9 * (1 - 0.5**0.5), rel=1e-4)
    rate = schedule(recipe("hdrq", iterations=100, weight_lr=1e-3))[:, 0]
    assert rate[0] == pytest.approx(1e-6) and rate[20] == pytest.approx(1e-3) and rate[60] == pytest.approx(5e-4)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_step_by_a_share_of_their_scale(per_channel, every_step_kept):
    """At a rate that would tear them apart, each weight stays within so many steps of Adam's, each bounded."""
    options = {"iterations": 4, "warmup": 0.0, "scale_step": 0.0, "bits": {"*": "W8A8"}, "per_channel": per_channel}
    full = fold(net(), CALIBRATION)

    def steps(**knobs):
        layers = quantized_layers(learn(weight_lr=10.0, fake_quant_fraction=1.0, **options, **knobs))
        return max(
            float(((layer.latent - full.get_submodule(name).weight) / per_element(layer)).abs().max())
            for name, layer in layers.items()
        )

    def per_element(layer):
        scale = layer.weight_quantizer.scale
        return scale.view(-1, *[1] * (layer.latent.ndim - 1))

    assert 1 < steps(weight_step=0.5) < 4 * 0.5 * 1.5 + 0.5 < steps(weight_step=0.0)


class Small(nn.Module):
    """The function of a network of ordinary weights, computed with weights and activations of other sizes."""

    def __init__(self, weights=1.0, activations=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data *= weights
        self.weights, self.activations = weights, activations

    def forward(self, x):
        x = self.first(x * self.activations).relu() / self.weights
        return self.second(x) / (self.weights * self.activations)


@pytest.mark.parametrize("recipe", ["hdrq", "qdrop", "brecq"])
@pytest.mark.parametrize("size", [{"weights": 1e-3}, {"weights": 1e-5}, {"activations": 1e-5}, {"activations": 1e-8}])
@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
def test_rates_follow_the_size_of_what_is_learned(recipe, size):
    data, model = torch.randn(128, 16, generator=torch.Generator().manual_seed(0)), Small(**size).eval()
    options = {"bits": {"*": "W4A4"}, "progress": False}
    learned = hdrq.quantize(model, data, recipe, iterations=100, distance=0, **options)
    nearest = hdrq.quantize(model, data, "rtn", **options)
    with torch.no_grad():
        after, before = ((each(data) - model(data)).norm() for each in (learned, nearest))
    assert after < 1.1 * before


@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_scales_stay_positive_and_finite_whatever_the_optimiser_does(recipe):
    for rates in ({"activation_lr": 1e3}, {"activation_lr": 1e38}):
        with suppress(hdrq.DivergenceError):
            model = learn(recipe=recipe, **rates)
            scales = torch.cat([q.scale for q in model.modules() if hasattr(q, "qmin")])
            assert ((scales > 0) & scales.isfinite()).all()
