"""Digits: rendered ones are the source, three other domains the targets; networks in any minima, or in flat ones."""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import Tensor

from hdrq.demo import data, train
from hdrq.demo.model import resnet
from hdrq.reproduce import flat_training
from hdrq.reproduce.tasks.task import CALIBRATION, Task


def digits(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """The demo's domains with larger test sets: 3,000 digits of MNIST, plain and on photographs, and 797 of optdigits.

    "mnist" and "photos" are adapted on disjoint digits, and tested on the same ones, which neither was adapted on.
    """
    train, test = slice(0, CALIBRATION), slice(2 * CALIBRATION, None)
    if domain == data.SOURCE:
        return data.load(domain, split)
    if domain == "optdigits":
        return data.target(domain, train if split == "train" else slice(CALIBRATION, None))
    if split == "test":
        return data.target(domain, test, seed=1)
    return data.target(domain, train if domain == "mnist" else slice(CALIBRATION, 2 * CALIBRATION))


DIGITS = Task("digits", data.SOURCE, data.TARGETS, digits, resnet)
DIGITS_SAM = replace(DIGITS, name="digits-sam", training=flat_training, facts=inspect.getsource(train))
