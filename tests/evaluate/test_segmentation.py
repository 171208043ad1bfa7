"""mIoU: against a count by hand, class by class."""

import pytest
import torch
from torch import nn

import hdrq.evaluate as ev


class Told(nn.Module):
    """The classes that it is given, as logits."""

    def __init__(self, classes=3):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return nn.functional.one_hot(x.long(), self.classes).movedim(-1, 1).float()


@pytest.fixture
def maps():
    g = torch.Generator().manual_seed(0)
    told, labels = (torch.randint(0, 3, (5, 4, 6), generator=g) for _ in range(2))
    labels[torch.rand(labels.shape, generator=g) < 0.3] = 255
    return told, labels


def by_hand(told, labels, c):
    seen = labels != 255
    return ((told == c) & (labels == c)).sum(), (((told == c) | (labels == c)) & seen).sum()


def test_iou_is_that_of_sums_over_labelled_pixels(maps):
    told, labels = maps
    expected = torch.tensor([float(i) / float(u) for i, u in (by_hand(told, labels, c) for c in range(3))])
    assert torch.allclose(ev.class_iou(Told(), told, labels, batch_size=2), expected.double())
    assert ev.mean_iou(Told(), told, labels.to(torch.uint8)) == pytest.approx(100 * float(expected.mean()))


def test_counts_are_each_images_own(maps):
    told, labels = maps
    counts = ev.class_counts(Told(), zip(told.split(2), labels.split(2), strict=True))
    assert counts.shape == (5, 2, 3)
    for n in range(5):
        for c in range(3):
            assert tuple(counts[n, :, c]) == by_hand(told[n], labels[n], c)


def test_a_class_that_is_nowhere_counts_for_nothing(maps):
    told, labels = maps
    assert ev.mean_iou(Told(9), told, labels) == pytest.approx(ev.mean_iou(Told(), told, labels))
    assert ev.class_iou(Told(9), told, labels).isnan().sum() == 6


def test_small_logits_are_upsampled():
    logits = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    labels = nn.functional.interpolate(logits, size=(7, 9), mode="bilinear", align_corners=False).argmax(1)
    assert ev.mean_iou(nn.Identity(), logits, labels) == 100.0


def test_another_label_is_ignored_where_asked(maps):
    told, labels = maps
    zero = ev.class_iou(Told(), told, labels.where(labels != 255, torch.tensor(0)), ignore=0)
    assert zero[0] == 0 and zero[1] > 0  # nothing is labelled 0, but some labelled pixels are told so


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told, labels: (told[:0], labels[:0]), r"map \(H, W\) for each image, got \(0, 4, 6\) for 0 images"),
        (lambda told, labels: (told, labels[:, 0]), r"map \(H, W\) for each image, got \(5, 6\) for 5 images"),
        (lambda told, labels: (told, labels[:2]), r"map \(H, W\) for each image, got \(2, 4, 6\) for 5 images"),
        (lambda told, labels: (told, labels.clamp(max=7)), "labels must be classes of the model, of 3, or 255, got 7"),
        (lambda told, labels: (told, -labels), "labels must be classes of the model, of 3, or 255, got -"),
        (lambda told, labels: (told[:, 0], labels), r"must be logits \(N, C, H, W\) to be measured by labels"),
    ],
)
def test_bad_input(maps, change, message):
    with pytest.raises(ValueError, match=message):
        ev.mean_iou(Told(), *change(*maps))


def test_accuracy_refuses_label_maps(maps):
    with pytest.raises(ValueError, match="label maps are measured by mean_iou"):
        ev.accuracy(Told(), maps[0], maps[0][:, 0, 0])
