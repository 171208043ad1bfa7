"""A model that returns NaN or infinity in full precision is refused before anything is searched or learned."""

import warnings

import pytest
import torch
from torch import nn

import hdrq


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Ends(nn.Module):
    """Two layers; what stands between and behind them is given."""

    def __init__(self, between, behind):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.between, self.behind = nn.Linear(4, 4), nn.Linear(4, 4), between, behind

    def forward(self, x):
        return self.behind(self.b(self.between(self.a(x))))


X = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) + 0.1
OPTIONS = {"distance": 0, "iterations": 2, "progress": False}


def same(x):
    return x


def negative_in_sample_290(x):
    x = x.clone()
    x[290:] = -1
    return x


def quantized(model, recipe="hdrq", x=X, **options):
    return hdrq.quantize(model.eval(), x, recipe, **({} if recipe == "rtn" else OPTIONS), **options)


@pytest.mark.parametrize("recipe", ["rtn", "hdrq"])
def test_the_first_module_that_returns_nan_is_named(recipe):
    with pytest.raises(ValueError, match=r"finite values on calibration, got NaN .* first from layer '1' \(Log\);"):
        quantized(nn.Sequential(nn.Linear(4, 4), Log(), nn.Linear(4, 4), nn.Linear(4, 4)), recipe)


def test_nan_that_is_computed_between_modules_is_named_by_who_reads_it():
    with pytest.raises(ValueError, match=r"first from layer 'b' \(Linear\), which reads one that no module returned;"):
        quantized(Ends(torch.log, same))


def test_every_sample_is_looked_at_where_something_is_learned():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), Log(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    quantized(model)
    with pytest.raises(ValueError, match=r"among samples 256 to 299, first from layer '2' \(Log\)"):
        quantized(model, x=negative_in_sample_290(X))


def test_nan_that_only_the_models_own_forward_makes_is_refused():
    with pytest.raises(ValueError, match=r"first from the model's own forward \(Ends\)"):
        quantized(Ends(same, torch.log), "rtn")


def test_held_out_is_looked_at_too():
    with pytest.raises(ValueError, match="finite values on held_out"):
        quantized(nn.Sequential(Log(), nn.Linear(4, 4)), held_out=negative_in_sample_290(X))


def test_infinity_of_a_unit_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"first from layer '1' \(Linear\)"):
        quantized(model, "rtn")


def test_masked_logits_pass_with_a_warning():
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    with pytest.warns(UserWarning, match="model returns infinity on calibration, behind its last unit"):
        result = quantized(Ends(same, lambda x: x + mask))
    assert result(X).isinf().any(0).tolist() == [False, False, True, False]


def test_a_mask_beside_what_a_unit_returns_passes():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.b(self.a(x)), mask

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            mask = torch.full_like(x, -torch.inf)
            for block in self.blocks:
                x, mask = block(x, mask)
            return x

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model returns infinity")
        assert quantized(Model())(X).isfinite().all()
