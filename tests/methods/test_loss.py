"""The reconstruction loss: channels are summed wherever they lie, batch and positions are averaged."""

import pytest
import torch
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.methods.loss import reconstruction_loss, reported_samples


def test_channels_are_summed_and_the_rest_is_averaged():
    output = torch.zeros(2, 5, 3)
    assert reconstruction_loss(output, output + 2, 1) == 20 and reconstruction_loss(output, output + 2, 2) == 12


def test_losses_are_reported_on_samples_of_every_task():
    """Calibration sets of tasks lie one behind the other."""
    found = reported_samples(3 * 256)
    assert len(found) == 256 and [int((found // 256 == task).sum()) for task in range(3)] == [86, 85, 85]
    assert reported_samples(96).tolist() == list(range(96)) and not len(reported_samples(0))


class Unit(nn.Module):
    """A layer, and what is done to its output."""

    def __init__(self, layer, after=lambda x: x):
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, x):
        return self.after(self.layer(x))


UNITS = {  # the unit's layer and what follows it; the shape of a sample; the layer's channels, or the axis' length
    "linear": (nn.Linear(6, 5), None, (6,), 5),
    "tokens": (nn.Linear(6, 5), None, (7, 6), 5),
    "channels last": (nn.Linear(6, 5), None, (3, 4, 6), 5),
    "conv1d": (nn.Conv1d(6, 5, 3), None, (6, 9), 5),
    "conv2d": (nn.Conv2d(6, 5, 3), None, (6, 8, 9), 5),
    "conv3d": (nn.Conv3d(6, 5, 2), None, (6, 4, 3, 2), 5),
    "transposed": (nn.ConvTranspose1d(6, 4, 3, groups=2), None, (6, 9), 4),
    "patches": (nn.Conv2d(6, 5, 2, stride=2), lambda x: x.flatten(2).mT, (6, 8, 8), 5),
    "sequence first": (nn.Linear(6, 5), lambda x: x.permute(0, 2, 1), (7, 6), 5),
    "one number": (nn.Linear(6, 1), lambda x: x.squeeze(-1), (6,), 1),
    "pooled": (nn.Conv2d(6, 5, 3), lambda x: x.amax((1, 2)), (6, 8, 9), 7),
    "flattened": (nn.Conv2d(6, 5, 3), lambda x: x.flatten(1), (6, 5, 5), 45),
}


@pytest.mark.parametrize("name", UNITS)
def test_channels_are_those_of_the_last_layer(name):
    """The loss of a unit is its mean squared error times the number of its channels."""
    layer, after, shape, channels = UNITS[name]
    unit = Unit(layer, *[after] if after else []).eval()
    data = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))
    options = {"bits": {"*": "W3A3"}, "iterations": 1, "weight_lr": 0.0, "activation_lr": 0.0, "progress": False}
    result = hdrq.quantize(nn.Sequential(unit).eval(), data, "qdrop", blocks=["0"], **options)
    with torch.no_grad():
        error = (hdrq.quantize(nn.Sequential(unit).eval(), data, "rtn", bits={"*": "W3A3"})(data) - unit(data)).square()
    assert report_of(result).blocks[0].loss_before == pytest.approx(channels * float(error.mean()), rel=1e-5)
