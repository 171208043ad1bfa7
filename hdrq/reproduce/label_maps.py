"""Folders of domains with label maps: Cityscapes, IDD, GTA5, as :mod:`hdrq.calibrate.labelmaps` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdrq import checks
from hdrq.calibrate.images import MEAN, STD
from hdrq.calibrate.labelmaps import LAYOUTS, exact_reader, list_images, list_label_maps, map_reader
from hdrq.reproduce.folders import SPLITS, Pictures


@dataclass(frozen=True)
class LabelMaps:
    """The domains of a folder: called with a domain and "test", it gives images and their label maps.

    With "train" it gives images, in an order that a seed draws, and again none of their label maps, which targets need
    not have.

    Args:
        data: a folder with one for each domain.
        layouts: by domain: how its folder is laid out.
        size: (H, W) of images; ``label_size``, (h, w), of label maps, as :func:`load_label_maps` has them.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …". A file that cannot be read is named when it is
        read.
    """

    data: Path
    layouts: Mapping[str, str]
    size: tuple[int, int]
    label_size: tuple[int, int]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    split_seed: int = 0

    def __call__(self, domain: str, split: str) -> tuple[Pictures, Pictures | Tensor]:
        checks.choice("domain", domain, tuple(self.layouts))
        files, maps = self.listing[domain, checks.choice("split", split, SPLITS)]
        return Pictures(files, exact_reader(self.size, self.mean, self.std)), maps

    @cached_property
    def listing(self) -> dict[tuple[str, str], tuple[list[Path], Pictures | Tensor]]:
        """By domain and split: the images, and their label maps, none of "train"."""
        found: dict[tuple[str, str], tuple[list[Path], Pictures | Tensor]] = {}
        for domain, layout in self.layouts.items():
            files = list_images(self.data / domain, layout, "train")
            order = np.random.default_rng(self.split_seed).permutation(len(files))
            found[domain, "train"] = ([files[i] for i in order], torch.empty(0))
            pairs, kind = list_label_maps(self.data / domain, layout, "test")
            found[domain, "test"] = ([image for image, _ in pairs], Pictures(pairs, map_reader(kind, self.label_size)))
        return found

    @property
    def facts(self) -> str:
        """What decides the tensors, but for the files' own contents and where the folder lies."""
        names = {
            key: [str(file.relative_to(self.data)) for file in files]
            for key, (files, _) in sorted(self.listing.items())
        }
        listed = hashlib.sha256(repr(names).encode()).hexdigest()
        return f"{self.layouts} {self.size} {self.label_size} {self.mean} {self.std} {listed}"

    @property
    def classes(self) -> int | None:
        """How many there are, if the layouts say so."""
        known = {len(LAYOUTS[name].classes or ()) for name in self.layouts.values()} - {0}
        return max(known, default=None)
