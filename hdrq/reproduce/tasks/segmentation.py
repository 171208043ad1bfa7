"""Segmentation of digits over photographs: training with label maps, and adaptation without them."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrq.reproduce.tasks import scenes
from hdrq.reproduce.tasks.task import Task
from hdrq.reproduce.tasks.unet import UNet

BATCH = 32
PART = 100  # images at a time where none is trained on
CHANGE = 0.1  # of contrast and brightness, at most
NOISE = 0.05  # its standard deviation, at most
SHIFT = 4  # pixels, at most


def train_source(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> nn.Module:
    """Supervised training: cross-entropy of every pixel. The model is changed."""
    schedule = torch.optim.lr_scheduler.OneCycleLR
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = schedule(optimizer, rate, total_steps=epochs * (len(images) // BATCH))
    model.train()
    for _ in range(epochs):
        for index in _batches(len(images)):
            _step(model, images[index], labels[index], optimizer, steps)
    return model.eval()


def adapt(source: Any, images: Tensor, epochs: int, rate: float) -> Any:
    """Statistics of the target, then self-training without the source's data.

    BatchNorm's statistics are estimated anew on the target (AdaBN, Li et al. 2017). Then each epoch learns the model's
    own labels, balanced between classes (CBST, Zou et al., ECCV 2018), on images that are shifted, and changed in
    contrast, brightness and noise (noisy student, Xie et al., CVPR 2020); the head stays as the source made it, as in
    SHOT (Liang et al., ICML 2020). ``source`` has a ``head`` and is left as it is.
    """
    model = estimate_statistics(copy.deepcopy(source), images)
    model.head.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(images) // BATCH))
    for _ in range(epochs):
        labels = pseudo_labels(model, images)
        model.train()
        for index in _batches(len(images)):
            _step(model, *varied(images[index], labels[index]), optimizer, steps)
    return estimate_statistics(model, images)


@torch.no_grad()
def estimate_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Set BatchNorm's running statistics to their means over the images; evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches
    model.train()
    for part in images.split(PART):
        model(part)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


@torch.no_grad()
def pseudo_labels(model: nn.Module, images: Tensor) -> Tensor:
    """The class of each pixel, uint8 (N, H, W), whose probability is greatest over what is usual of its class.

    That is the median over those pixels of all images at which the class is the most probable. Without it, classes that
    the model is less sure of lose pixels from epoch to epoch.
    """
    model.eval()
    p = torch.cat([model(part).softmax(1) for part in images.split(PART)])
    surest, labels = p.max(1)
    for label in labels.unique().tolist():
        p[:, label] /= surest[labels == label].median()
    return p.argmax(1).to(torch.uint8)


def varied(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images changed in contrast, brightness and noise, each by its own, and all shifted with their label maps."""
    shape = (len(images), 3, 1, 1)
    contrast, brightness = (CHANGE * (2 * torch.rand(shape) - 1) for _ in range(2))
    noise = NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
    shift = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    return (images * (1 + contrast) + brightness + noise).roll(shift, (2, 3)), labels.roll(shift, (1, 2))


def _step(model: nn.Module, images: Tensor, labels: Tensor, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels.long()).backward()
    optimizer.step()
    schedule.step()


def _batches(count: int) -> list[Tensor]:
    """Indices 0..count-1 in random order, in batches of equal size; the rest is left out."""
    return list(torch.randperm(count).split(BATCH))[: count // BATCH]


SEGMENTATION = Task(
    "segmentation",
    scenes.SOURCE,
    scenes.TARGETS,
    scenes.scenes,
    UNet,
    source_epochs=16,
    source_rate=4e-3,
    epochs=5,
    rate=3e-4,
    training=sys.modules[__name__],
    facts=inspect.getsource(scenes),
)
