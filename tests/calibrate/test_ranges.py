"""Ranges of activations: all channels count, batches do not, and weights are not rounded yet."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from networks import CALIBRATION, data, net
from torch import nn

import hdrq
from hdrq import ops
from hdrq.calibrate import ranges
from hdrq.calibrate.data import calibration_calls
from hdrq.quantizers.layers import input_quantizers


def scales(model, calibration, **options):
    quantized = hdrq.quantize(model, calibration, "rtn", **{"bits": {"*": "W8A4"}, **options})
    return {name: float(q.scale) for name, q in input_quantizers(quantized).items()}


@pytest.mark.parametrize("large", [0, 1, 3])
def test_every_channel_counts(large):
    """Elements a fixed stride apart are of some channels only: of 4 million elements, every fourth of 512 channels."""
    torch.manual_seed(0)
    x = torch.randn(128, 64, 512)
    x[..., large::4] *= 20
    found = scales(nn.Sequential(nn.Linear(512, 2)).eval(), x)["0"]
    want = float(ops.search_scale(x, -8, 7, norm=2.4, candidates=100))
    assert abs(found / want - 1) < 0.05


def test_batches_change_no_scale(monkeypatch):
    for sampled in (2**20, 2**12):  # all elements of the small network, and few of them
        monkeypatch.setattr(ranges, "SAMPLED", sampled)
        found = [scales(net(), list(CALIBRATION.split(size)), range_samples=40) for size in (96, 32, 7, 1)]
        assert all(each == found[0] for each in found)


def test_the_seed_draws_the_elements(monkeypatch):
    monkeypatch.setattr(ranges, "SAMPLED", 2**10)
    first, again, other = (scales(net(), CALIBRATION, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_weights_are_in_full_precision_while_activations_are_measured():
    assert scales(net(), CALIBRATION, bits={"*": "W2A4"}) == scales(net(), CALIBRATION, bits={"*": "W8A4"})


def test_extremes_are_added_once_and_only_where_elements_are_left_out(monkeypatch):
    model, calls = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2)).eval(), calibration_calls(data(32, 4, 8).split(5))
    monkeypatch.setattr(ranges, "SAMPLED", 32 * 16)
    read = ranges._read_samples(model, calls, ["0", "1"], seed=0)
    samples = {name: sampled.joined for name, sampled in read.items()}
    assert len(samples["0"]) == 32 * 16 + 2 and len(samples["1"]) == 32 * 4 * 2
    assert torch.equal(samples["0"][-2:], torch.stack(torch.aminmax(data(32, 4, 8))))


def test_drawn_elements_are_spread_without_a_period():
    places = ranges._drawn(1000, 250, torch.Generator().manual_seed(0))
    assert torch.equal(places // 4, torch.arange(250)) and (places % 4).bincount().min() > 40


def test_a_model_that_cannot_run_on_one_sample_is_measured_on_batches():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.second(F.relu(self.first(x)).mean((2, 3)).squeeze().index_select(1, torch.arange(8)))

    torch.manual_seed(0)
    model = Squeezed().eval()
    with pytest.raises(IndexError):
        model(data(1, 3, 8, 8))
    with pytest.warns(UserWarning, match="since the model on one sample raises IndexError: Dimension out") as said:
        assert set(scales(model, data(16, 3, 8, 8))) == {"first", "second"}
    assert [w.filename for w in said if "one sample" in str(w.message)] == [__file__]


def test_a_model_that_reaches_less_with_one_sample_is_measured_on_batches():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.second(self.first(x) if len(x) > 1 else x)

    with pytest.warns(UserWarning, match="since the model on one sample does not reach first; batches"):
        assert set(scales(Mixing().eval(), data(16, 6))) == {"first", "second"}


def test_samples_that_need_each_other_are_measured_on_batches():
    """As where they lie along another axis: each row of such data is a time, not a sample."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.second(self.first(x - x.mean(0)))

    torch.manual_seed(0)
    x, model = data(16, 6) + 5, Centred().eval()
    with pytest.warns(UserWarning, match="on one sample reads other values in first, so samples depend on each other"):
        found = scales(model, x)
    plain = nn.Sequential(OrderedDict(first=model.first, second=model.second)).eval()
    assert found == scales(plain, x - x.mean(0))
