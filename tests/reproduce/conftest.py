"""A task that is learned in a second."""

import pytest
import torch
from torch import nn

from hdrq.reproduce import tasks
from hdrq.reproduce.tasks import Task


class Small(nn.Module):
    """A convolution and its norm, and a linear head, on four numbers: (N, 3, 2, 2) to (N, 3)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16, 3)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.body(x))


def points(domain, split):
    """Three classes along as many directions, shifted a little in each domain."""
    g = torch.Generator().manual_seed({"train": 0, "test": 1}[split])
    labels = torch.randint(0, 3, (192,), generator=g)
    shift = {"source": 0.0, "one": 0.3, "two": -0.3}[domain]
    x = torch.randn((192, 3, 2, 2), generator=g) * 0.7 + shift
    x[torch.arange(192), labels] += 1.5
    return x, labels


@pytest.fixture
def small(monkeypatch):
    task = Task("small", "source", ("one", "two"), points, Small, source_epochs=16, epochs=2)
    monkeypatch.setitem(tasks.TASKS, "small", task)
    return task
