"""Steps of BRECQ, QDrop and HDRQ, parameter by parameter, against a loop in plain PyTorch: :mod:`oracle.loop`."""

import pytest
import torch
import torch.nn.functional as F
from oracle.contract import word
from oracle.loop import Rates, loop
from torch import nn

import hdrq
from hdrq.calibrate.sequential import Fitted
from hdrq.methods import post_training
from hdrq.methods.reconstruct.method import Reconstruction

STEPS, SEED = 5, 3
KNOBS = {"iterations": STEPS, "batch_size": 4, "weight_lr": 1e-2, "activation_lr": 1e-3}
NOISE = {"fake_quant_steps": 2, "distance": 5e-2, "warm_steps": 1}
OFFICIAL = NOISE | {"empirical": True, "noisy_activations": True, "scale_step": 1.0}
ROUNDING = {"learns": "rounding", "cosine": False}
RECIPES = {  # by name and preset: what the oracle is told
    "hdrq paper": NOISE,
    "hdrq official": OFFICIAL,
    "qdrop paper": ROUNDING,
    "qdrop affine": ROUNDING,
    "brecq paper": ROUNDING | {"input_keep": 1.0, "activation_keep": 1.0},
}


class Block(nn.Module):
    """Two layers, of which the second reads what a quantizer of its own rounds, and a second input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x, y):
        return F.relu(self.second(F.relu(self.first(x))) + x + y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.block = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), Block()

    def forward(self, x):
        return self.block(self.left(x), self.right(x))


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def in_the_oracle(model, unit, told, learner):
    """What the oracle makes of the unit, from what the unit holds before it is learned."""
    block = model.block

    def run(weights, act, x, y):
        x = act(1, x)
        h = act(0, F.relu(F.conv2d(x, weights[0], block.first.bias, padding=1)))
        return F.relu(F.conv2d(h, weights[1], block.second.bias, padding=1) + x + y)

    def draw(stream, step, shape):
        words = [word(SEED, stream ^ (unit.index << 16), step, e) for e in range(shape.numel())]
        return torch.tensor(words).view(shape)

    def grid(quantizer):
        """The scale, and the range of integers less the zero point: of each channel where there are several."""
        scale, zero = quantizer.scale.detach().clone(), quantizer.zero_point
        if zero is None:
            return scale, quantizer.qmin, quantizer.qmax
        return tuple(t.view(-1, 1, 1, 1) for t in (scale, quantizer.qmin - zero, quantizer.qmax - zero))

    weights = [
        (layer.latent.detach().clone(), *grid(layer.weight_quantizer), learner.source.get(layer.name))
        for layer in unit.layers
    ]
    scales = [grid(unit.activations[f"block.{name}input_quantizer"]) for name in ("second.", "")]
    pairs = [(a.tensor.clone(), b.tensor.clone()) for a, b in zip(unit.quantized, unit.full, strict=True)]
    rates = Rates(STEPS, weight_rate=KNOBS["weight_lr"], activation_rate=KNOBS["activation_lr"], **told)
    return loop(run, weights, scales, [*pairs, unit.target.tensor.clone()], rates, learner.indices, draw)


@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
@pytest.mark.parametrize("chosen", RECIPES)
def test_every_parameter_is_the_oracles(chosen, monkeypatch):
    name, preset = chosen.split()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, source, data = Net().eval(), Net().eval(), torch.randn(12, 3, 7, 7)
    compared = []

    class Watched(Reconstruction):
        def fit(self, unit, journal):
            if unit.name != "block":
                return super().fit(unit, journal)
            learner = self._learner(unit)
            begun = copied(learner.parameters.state())
            want = in_the_oracle(model, unit, RECIPES[chosen], learner)
            learner.learn(0, lambda *_: None, lambda _: None, 0)
            compared.append((begun, want, copied(learner.parameters.state())))
            learner.parameters.finish()
            return Fitted({}, {"loss_before": 0.0, "loss_after": 0.0})

    monkeypatch.setattr(post_training, "Reconstruction", Watched)
    learns_weights = name == "hdrq"
    own = {"source": source, "fake_quant_fraction": 0.4, "learn_outputs": False} if learns_weights else {}
    knobs = KNOBS | own
    named = {"bits": {"*": "W3A3"}, "blocks": ["left", "right", "block"]}
    if preset == "affine":
        preset, knobs = "paper", knobs | {"affine_weights": True, "per_channel": True}
    hdrq.quantize(model, data, name, preset=preset, seed=SEED, progress=False, **named, **knobs)

    ((begun, want, got),) = compared
    parts = ("weight", "weight_scale") if learns_weights else ("alpha",)
    names = [f"block.{layer}.{part}" for part in parts for layer in ("first", "second")]
    names += ["block.second.input_quantizer.scale", "block.input_quantizer.scale"]
    assert begun.keys() == set(names)
    for key, (value, gradient) in zip(names, want, strict=True):
        moved = (value - begun[key]).abs().max()
        assert moved > 0 and (got[key] - value).abs().max() < 1e-4 * moved
        assert (got[f"{key}/exp_avg"] - gradient).abs().max() < 1e-4 * gradient.abs().max()
