"""Small networks and runs that several tests share."""

import torch
import torch.nn.functional as F
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


def error(model, reference):
    """Mean squared error of the outputs, relative to their variance, on data held out."""
    with torch.no_grad():
        want = reference(HELD_OUT)
        return float((model(HELD_OUT) - want).square().mean() / want.var())


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


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(model):
    """A model in evaluation mode whose BatchNorms are far from the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.3)
    return model.eval()


class SamePad(nn.Conv2d):
    """A convolution that pads its input itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class Block(nn.Module):
    """Two layers and a shortcut, both branches reading the block's input."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def blocks_net():
    return lively(nn.Sequential(SamePad(3, 4, 2), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(256, 3)))


class Checkpointed(nn.Module):
    """Two layers that are computed anew during the backward pass, or under a decorator."""

    def __init__(self, wrap):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wrap = wrap

    def inner(self, x):
        return x + self.second(self.first(x).relu())

    def forward(self, x):
        return self.wrap(self.inner, x)


TASKS = [CALIBRATION, CALIBRATION.flip(2) + 0.5]  # of the two relatives of one network


def relative(number, bits):
    """A quantized relative of one network, for one of the tasks."""
    model = net()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(data(*p.shape, seed=100 * number + len(name)) * 0.4 * p.abs().mean())
    return hdrq.quantize(model, TASKS[number], "rtn", bits={"*": bits}, per_channel=True, progress=False)


def deviation(merged, models):
    """How far a merge is from its models, each on its own task."""
    with torch.no_grad():
        return sum(float((merged(x) - own(x)).square().mean()) for x, own in zip(TASKS, models, strict=True))
