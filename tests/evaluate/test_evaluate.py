"""What a merged model is worth."""

import math

import pytest
import torch
from torch import nn

import hdrq
from hdrq.evaluate.landscape import error_barrier, loss_surface
from hdrq.evaluate.metrics import accuracy, harmonic_mean


@pytest.mark.parametrize(
    "values, want", [([40, 60], 48), ([1, 2, 4], 12 / 7), ([5], 5), ([0, 90], 0), ([0.0], 0), (iter([3, 6]), 4)]
)
def test_harmonic_mean(values, want):
    assert harmonic_mean(values) == pytest.approx(want)


@pytest.mark.parametrize("values", [[], [1, -1], [math.nan, 1], [1, math.nan], [math.inf]])
def test_harmonic_mean_of_other_values_is_refused(values):
    with pytest.raises(ValueError, match="values must be one or more finite numbers that are not negative, got"):
        harmonic_mean(values)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 500])
def test_accuracy_is_the_share_of_greatest_logits(batch_size):
    logits = torch.tensor([[0.0, 1], [1, 0], [3, 2], [-2, -1], [0, 1], [2, 1], [0, 9], [1, 2]])
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0])
    assert accuracy(nn.Identity(), logits, labels, batch_size) == 75.0


def test_accuracy_needs_a_label_for_each_image():
    images = torch.zeros(4, 2)
    for wrong in (torch.zeros(1).long(), torch.zeros(5).long(), torch.zeros(4, 1).long()):
        with pytest.raises(ValueError, match=r"labels must be one for each image, got \(.*\) for 4 images"):
            accuracy(nn.Identity(), images, wrong)
    with pytest.raises(ValueError, match="for 0 images"):
        accuracy(nn.Identity(), images[:0], torch.zeros(0).long())
    with pytest.raises(ValueError, match="batch_size must be in"):
        accuracy(nn.Identity(), images, torch.zeros(4).long(), 0)


class Point(nn.Module):
    """A model of two weights, whose place in the plane is known."""

    def __init__(self, *at):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=torch.float32))


def bowl(model):
    return float(model.at.detach().double().square().sum())


def test_error_barrier_of_a_saddle_and_of_a_bowl():
    first, second = Point(-2, 0), Point(2, 0)
    hill = error_barrier(first, second, lambda m: -bowl(m), points=5)
    assert hill.value == 4 and hill.positions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert hill.losses.tolist() == [-4, -1, 0, -1, -4]
    assert error_barrier(first, second, bowl).value == 0
    assert error_barrier(Point(0, 0), second, bowl).value == 2  # ends of unequal loss: half their difference
    assert first.at.tolist() == [-2, 0]


def test_error_barrier_of_quantized_models_goes_through_rounded_ones():
    def quantized(seed):
        torch.manual_seed(seed)
        return hdrq.quantize(nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(20, 3), "rtn", bits={"*": "W4A8"})

    def off_grid(model):
        scaled = (model[0].weight / model[0].parametrizations.weight[0].scale).detach()
        return float((scaled - scaled.round()).abs().max())

    barrier = error_barrier(quantized(0), quantized(1), off_grid, points=3)
    assert barrier.losses.max() < 1e-5


def test_both_ends_of_the_barrier_are_the_models_though_their_ranges_differ():
    def quantized(seed, low):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 6), nn.ELU(), nn.Linear(6, 3)).eval()
        result = hdrq.quantize(model, 4 * torch.randn(200, 6), "rtn", bits={"*": "W8A4"})
        result[2].input_quantizer.qmin, result[2].input_quantizer.qmax = low, low + 15
        return result

    def size(model):
        return float(model(x).detach().double().square().sum())

    first, second, x = quantized(0, -1), quantized(1, -6), torch.randn(50, 6)
    assert error_barrier(first, second, size, points=3).losses[[0, 2]].tolist() == [size(first), size(second)]


def test_loss_surface_holds_the_models_at_their_places():
    models = Point(1, 1), Point(4, 1), Point(3, 5)
    surface = loss_surface(models, bowl, points=9, margin=0.5)
    torch.testing.assert_close(surface.places, torch.tensor([[0.0, 0], [3, 0], [2, 4]]).double())
    assert (surface.x[0], surface.x[-1], surface.y[0], surface.y[-1]) == (-1.5, 4.5, -2, 6)
    want = (surface.x + 1).square() + (surface.y[:, None] + 1).square()
    torch.testing.assert_close(surface.losses, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: error_barrier(p, nn.Linear(2, 1), bowl), "one architecture, got number 1 different in at; bias"),
        (lambda p: error_barrier(p, p, bowl, points=1), r"points must be in \[2, \d+\], got 1"),
        (lambda p: loss_surface([p, p], bowl), "models must be three, got 2"),
        (
            lambda p: loss_surface([p, Point(2, 2), Point(5, 5)], bowl),
            "models must span a plane, got three on one line",
        ),
        (lambda p: loss_surface([p, p, Point(5, 5)], bowl), "models must span a plane, got three on one line"),
    ],
)
def test_what_has_no_path_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Point(0, 0))
