"""Changes of weights that layers share, that are read twice, or into which a norm is folded."""

import pytest
import torch
from helpers import same, state
from merging.adding_models import (
    TOKENS,
    close,
    factors,
    net,
    save,
)
from networks import data
from torch import nn

import hdrq
from hdrq.merging import add, add_file
from hdrq.merging.changes import Change

TIED = {"quantized": {"*": "W8A8"}, "float": {"embed": "float", "out": "float", "*": "W8A8"}}


@pytest.mark.parametrize("bits", TIED.values(), ids=TIED)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_weight_that_layers_share_changes_once(bits, as_file, tmp_path):
    model = hdrq.quantize(net(tie=True), TOKENS, "rtn", bits=bits, attention=False)
    hdrq.save(model, tmp_path / "q")

    def added(change):
        if not as_file:
            return add(model, change).model
        add_file(tmp_path / "q", change, tmp_path / "out")
        return hdrq.load(tmp_path / "out", net(tie=True))

    delta = data(11, 8) * 0.05
    results = [
        added({name: delta for name in names})
        for names in (["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"])
    ]
    assert all(same(state(result), state(results[0])) for result in results)
    close(results[0], model, {"embed.weight": delta, "out.weight": delta})
    assert not torch.equal(results[0].embed.weight, model.embed.weight)
    assert torch.equal(results[0].embed.weight, results[0].out.weight)
    with pytest.raises(ValueError, match=r"must be for weights of one layer each, got out\.weight \(.*embed\.weight"):
        added(Change(factors(model, "out"), alpha=1))
    if bits is TIED["quantized"]:
        with pytest.raises(ValueError, match=r"changes of embed\.weight must be one for all layers that share it"):
            added({"embed.weight": delta, "out.weight": 2 * delta})


def test_a_norm_that_was_never_trained_is_no_folded_one():
    model = hdrq.quantize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).eval(), data(16, 3, 8, 8), "rtn")
    assert add(model, Change(factors(model, "1", scale=0.01), alpha=1)).report.tensors[0].name == "1.weight"


class Twice(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def test_a_weight_that_two_layers_read_has_no_one_input():
    model = hdrq.quantize(Twice().eval(), data(32, 6), "rtn", bits={"*": "W8A8"})
    with pytest.warns(UserWarning, match=r"rule calibrated could not serve one\.weight \(systematic\)"):
        (row,) = add(
            model, {"one.weight": data(6, 6) * 0.01}, rule="calibrated", calibration=data(32, 6)
        ).report.tensors
    assert row.rule == "systematic" and row.input_error is None


BATCHNORM = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()


def test_weights_into_which_batchnorm_is_folded(tmp_path):
    BATCHNORM[1].running_var.fill_(4.0)
    model = hdrq.quantize(BATCHNORM, data(16, 3, 8, 8), "rtn", bits="W8A8")
    assert add(model, Change(factors(model, "3"), alpha=1)).report.kept > 0.5
    with pytest.raises(
        ValueError, match=r"for weights as they were trained, got 0\.weight \(of 1\), into which BatchN"
    ):
        add(model, Change(factors(model, "0"), alpha=1))
    with pytest.raises(ValueError, match="with the BatchNorms folded that the model has folded, got 1; give states"):
        add(model, Change(BATCHNORM.state_dict(), minus=BATCHNORM.state_dict()))
    other = hdrq.load(save(model, tmp_path / "q"), BATCHNORM)
    other[3].bias.data.add_(0.5)
    found = add(model, Change(save(other, tmp_path / "b"), minus=tmp_path / "q"))
    assert [row.name for row in found.report.tensors] == ["3.bias"]
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    plain = hdrq.quantize(plain, data(16, 3, 8, 8), "rtn")
    with pytest.raises(ValueError, match="with the BatchNorms folded that the model has folded, got others"):
        add(model, Change(save(plain, tmp_path / "p"), minus=tmp_path / "p"))


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has them: its factor is folded, and it keeps its place."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def test_a_norm_that_keeps_its_place_is_known_by_its_statistics():
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), NormAct(5), nn.Conv2d(5, 4, 3)).eval()
    plain[1].running_var.fill_(4.0)
    model = hdrq.quantize(plain, data(16, 3, 8, 8), "rtn", bits="W8A8")
    assert 0.99 < model[1].running_var[0] < 1
    with pytest.raises(ValueError, match=r"got 0\.weight \(it may be of 1\); .*|0\.weight \(it may be of 1\)"):
        add(model, Change(factors(model, "0"), alpha=1))
    with pytest.raises(ValueError, match="with the BatchNorms folded that the model has folded, got 1"):
        add(model, Change(plain.state_dict(), minus=plain.state_dict()))
