"""Which tensor of an output is measured, and what counts as right."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hdrq.evaluate.metrics import accuracy, accuracy_of, logits_of


def test_logits_come_before_a_loss():
    logits = torch.randn(2, 3)
    assert logits_of({"loss": torch.tensor(1.0), "logits": logits}, "output") is logits
    assert logits_of((logits, torch.tensor(1)), "output") is logits


def test_an_output_without_floats_is_named():
    for output in (None, torch.arange(3), {"logits": None}):
        with pytest.raises(ValueError, match="output of block a must hold a floating-point tensor"):
            logits_of(output, "output of block a")


class Logits(nn.Module):
    """Returns what it is given."""

    def forward(self, x):
        return x


LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 0.0, 2.0], [0.0, 3.0, 2.0, 1.0]])
LABELS = torch.tensor([1, 3, 2, 0])  # second, first, last and last of the logits


@pytest.mark.parametrize("top, right", [(1, 25.0), (2, 50.0), (3, 50.0), (4, 100.0)])
def test_a_label_may_be_among_the_first(top, right):
    assert accuracy(Logits(), LOGITS, LABELS, batch_size=3, top=top) == right
    assert accuracy_of(Logits(), DataLoader(TensorDataset(LOGITS, LABELS), 2), top) == right


@pytest.mark.parametrize(
    "batches, top, message",
    [
        ([(LOGITS, LABELS)], 5, "top must be at most the 4 classes that the model tells, got 5"),
        ([(LOGITS, LABELS)], 0, "top must be in"),
        ([], 1, "batches must have at least one image, got none"),
        ([(LOGITS * float("nan"), LABELS)], 1, "logits must hold no NaN to be ranked, got some from the model"),
        ([(LOGITS, LABELS + 1)], 1, r"labels must be in \[0, 3\], the classes that the model tells, got 1 to 4"),
        ([(LOGITS, LABELS - 1)], 2, r"labels must be in \[0, 3\], the classes that the model tells, got -1 to 2"),
        ([(LOGITS, LABELS.float())], 1, "labels must be integers, got float32"),
    ],
)
def test_what_cannot_be_counted_is_refused(batches, top, message):
    with pytest.raises((TypeError, ValueError), match=message):
        accuracy_of(Logits(), batches, top)
