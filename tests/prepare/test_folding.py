"""BatchNorm is folded by execution order, and left alone where it cannot be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import data, lively
from torch import nn

from hdrq.prepare.folding import fold_batchnorm


def fold(model, x):
    """The folded pairs of a copy, and the copy, whose outputs are checked."""
    folded = copy.deepcopy(model)
    pairs = fold_batchnorm(folded, lambda m: m(x))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    return pairs, folded


class Scattered(nn.Module):
    """Norms are declared far from their layers and in another order; one reads the image, one a sum."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({"b": nn.BatchNorm2d(6), "a": nn.BatchNorm2d(4), "sum": nn.BatchNorm2d(6)})
        self.image_norm = nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.BatchNorm1d(5)), nn.ReLU(), nn.Linear(5, 2))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False))
        self.body = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x):
        x = F.relu(self.norms["a"](self.stem(self.image_norm(x))))
        x = self.norms["b"](self.body(x))
        x = self.norms["sum"](x + 1).mean((2, 3))
        return self.head(x)


class Branching(nn.Module):
    """A convolution whose output goes to a BatchNorm and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_batchnorm_folds_by_execution_order():
    model = lively(Scattered())
    pairs, folded = fold(model, data(8, 3, 8, 8))
    assert pairs == {"norms.a": "stem.0", "norms.b": "body", "head.1.0": "head.0"}
    assert isinstance(folded.norms["sum"], nn.BatchNorm2d) and isinstance(folded.image_norm, nn.BatchNorm2d)
    assert folded.stem[0].bias is not None


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (4, 5, 6)),
    ],
    ids=["no layer", "changed in place", "no statistics", "axis 1 is not the layer's channels"],
)
def test_batchnorm_that_cannot_be_folded_is_left_alone(model, shape):
    assert fold(lively(model), data(*shape))[0] == {}


def test_layer_that_runs_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    assert fold(lively(Twice()), data(4, 3, 6, 6))[0] == {}


def test_batchnorm_without_weights_folds():
    model = lively(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)))
    assert fold(model, data(9, 6))[0] == {"1": "0"}
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    assert fold(model, data(9, 3, 5, 5))[0] == {"1": "0"}


def test_batchnorm_of_a_model_in_bfloat16_folds():
    model = lively(Scattered()).bfloat16()
    assert len(fold_batchnorm(model, lambda m: m(data(8, 3, 8, 8).bfloat16()))) == 3
    assert model.body.weight.dtype == torch.bfloat16


def test_output_read_elsewhere_is_refused():
    with pytest.raises(ValueError, match="folding BatchNorm must leave the outputs as they are, got a relative change"):
        fold_batchnorm(lively(Branching()), lambda m: m(data(4, 3, 6, 6)))
