"""Small networks and runs that several tests share."""

import torch
from torch import nn

import hdrq

CALIBRATION = torch.randn((96, 3, 8, 8), generator=torch.Generator().manual_seed(0)).cumsum(3) * 0.5
HELD_OUT = torch.randn((64, 3, 8, 8), generator=torch.Generator().manual_seed(1)).cumsum(3) * 0.5


def net(seed=0):
    """Convolutions with BatchNorm, then a linear layer: the weights are random, so every bit counts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 6),
        )
        with torch.no_grad():
            model(CALIBRATION)  # the statistics of BatchNorm
    return model.eval()


def learn(model=None, calibration=CALIBRATION, **options):
    return hdrq.quantize(model or net(), calibration, **{"bits": "W3A3", "iterations": 6, "distance": 0, **options})


SAMPLES = torch.randn((48, 3, 6, 6), generator=torch.Generator().manual_seed(0))


class Mergeable(nn.Module):
    """Convolutions and a linear layer, a BatchNorm that stays, an integer buffer, and a parameter of its own."""

    def __init__(self, width=6, table=16):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.gain = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.register_buffer("table", torch.arange(table))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(self.a(self.norm(x)))
        return self.head((torch.relu(self.b(x)) * self.gain).mean((2, 3)))


def mergeable(seed, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mergeable(**options)
        for _ in range(seed + 1):  # statistics, and the count of batches, differ between models
            model(SAMPLES + seed)
    return model.eval()


def quantized(seed, bits="W4A4", **options):
    return hdrq.quantize(mergeable(seed, **options), SAMPLES, "rtn", bits=bits)
