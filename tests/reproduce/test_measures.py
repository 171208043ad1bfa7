"""What an image contributes: alike for accuracy and mIoU, in memory, as text, and in intervals."""

import numpy as np
import pytest
import torch
from torch import nn

from hdrq.evaluate import accuracy, mean_iou
from hdrq.reproduce.measures import contributions, decoded, encoded, measures_of, score
from hdrq.reproduce.statistics import estimate


class Pointwise(nn.Module):
    """Logits of each pixel, or of each image: (N, 3, H, W) to (N, 4, H, W) or (N, 4)."""

    def __init__(self, pixels):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.pixels = nn.Conv2d(3, 4, 1), pixels

    def forward(self, x):
        return self.layer(x if self.pixels else x.mean((2, 3), keepdim=True)).squeeze(3 if self.pixels else (2, 3))


def data(pixels):
    g = torch.Generator().manual_seed(0)
    images = torch.randn((12, 3, 5, 6), generator=g) + torch.randn((12, 3, 1, 1), generator=g)
    labels = torch.randint(0, 4, (12, 5, 6) if pixels else (12,), generator=g)
    return images, labels.where(labels > 0, labels * 0 + 255) if pixels else labels


def counts(n=40, classes=3, seed=0, share=0.7):
    """Of images whose classes have up to 400 pixels in their unions, of which about ``share`` are intersections."""
    rng = np.random.default_rng(seed)
    union = rng.integers(0, 400, (n, classes))
    return np.stack([rng.binomial(union, share), union], 1)


@pytest.mark.parametrize(("pixels", "measure"), [(False, accuracy), (True, mean_iou)])
def test_a_score_is_the_measure(pixels, measure, monkeypatch):
    model = Pointwise(pixels)
    values = contributions(model, *data(pixels))
    assert 100 * score(values) == pytest.approx(measure(model, *data(pixels)))
    assert measures_of(values) == ("mIoU" if pixels else "accuracies")
    monkeypatch.setattr("hdrq.reproduce.measures.PIXELS", 60)  # two images at a time
    assert np.array_equal(contributions(model, *data(pixels)), values)
    monkeypatch.setattr("hdrq.reproduce.measures.GROUPS", 5)  # of three images each
    grouped = contributions(model, *data(pixels))
    assert np.array_equal(grouped, values.reshape(4, 3, 2, 4).sum(1) if pixels else values)


@pytest.mark.parametrize("values", [counts()[:, 0, 0] > 100, counts()])
def test_shares_are_a_sample(values):
    """A sample with replacement has the score of the images in it, as often as they are."""
    drawn = np.random.default_rng(0).integers(len(values), size=(5, len(values)))
    shares = np.stack([np.bincount(row, minlength=len(values)) for row in drawn]) / len(values)
    assert score(values, shares) == pytest.approx([float(score(values[row])) for row in drawn])


@pytest.mark.parametrize("count", [1, 7, 8, 3000])
def test_rightness_is_text_and_back(count):
    right = np.random.default_rng(count).random(count) < 0.8
    assert np.array_equal(decoded(encoded(right)), right) and decoded(encoded(right)).dtype == bool


@pytest.mark.parametrize("most", [0, 1, 255, 256, 2**16, 2**21])
def test_counts_are_text_and_back(most):
    values = counts() * most // 400
    found = decoded(encoded(values))
    assert np.array_equal(found, values) and found.shape == values.shape


def test_a_class_in_no_image_of_a_sample_counts_for_nothing():
    values = counts()
    nowhere = np.concatenate([values, np.zeros((len(values), 2, 1), int)], 2)
    assert score(nowhere) == score(values)


def test_intervals_of_miou_hold_it():
    """Of 100 test sets drawn from one law, the intervals of about 95 hold the law's mIoU."""
    held = 0
    for seed in range(100):
        one = estimate([{0: {"x": counts(200, seed=seed)}}])
        held += one.low <= 70 <= one.high
    assert 88 <= held <= 99


def test_intervals_of_groups_are_those_of_images():
    values = counts(2000)
    images, groups = (estimate([{0: {"x": each}}]) for each in (values, values.reshape(100, 20, 2, 3).sum(1)))
    assert groups.mean == pytest.approx(images.mean)
    assert groups.high - groups.low == pytest.approx(images.high - images.low, rel=0.25)


def test_differences_of_miou_are_paired():
    """The same model but for a twentieth of what it finds: a difference that images share."""
    values = counts(400)
    worse = values.copy()
    worse[:, 0] -= worse[:, 0] // 20
    found = estimate([{0: {"x": values}}], [{0: {"x": worse}}])
    assert 3 < found.low < found.high < 4 and found.high - found.low < 0.2
