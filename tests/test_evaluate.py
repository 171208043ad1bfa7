"""What a merged model is worth."""

import math

import pytest
import torch
from torch import nn

from hdrq.evaluate import accuracy, harmonic_mean

torch.set_num_threads(1)


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
