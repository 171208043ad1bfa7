"""The small network whose checkpoints the tests here write and read."""

import torch
from torch import nn

import hdrq

X = torch.randn((32, 3, 6, 6), generator=torch.Generator().manual_seed(0))


def net(seed=0, width=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.Flatten(),
            nn.Linear(4 * width, 4),
        )
        model(X)
    return model.eval()


def quantized(seed=0, **options):
    return hdrq.quantize(net(seed), X, "rtn", **options)
