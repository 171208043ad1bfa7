"""Folders of domains of classes: Office-Home, DomainNet, PACS, and any other of that form.

    <data>/<domain>/<class>/*.jpg        and, as DomainNet has them, <data>/<domain>_train.txt and <domain>_test.txt

Without lists every class of every domain is split by a seed. A line of a list is a path from <data> and a class's
number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdrq import checks
from hdrq.calibrate.images import IMAGES, MEAN, STD, class_names, image_files, image_reader

SPLITS = ("train", "test")


class Pictures:
    """Images, or label maps, in files as a tensor (N, …) of which only the parts that are asked for are read.

    Args:
        reader: makes a tensor of some of the files.
    """

    def __init__(self, files: Sequence[Any], reader: Callable[[Sequence[Any]], Tensor]) -> None:
        self.files, self.reader = files, reader

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return self.reader([self.files[i] for i in chosen])

    def first(self, count: int | None) -> Pictures:
        """The first of them; None for all."""
        return Pictures(self.files[:count], self.reader)

    def split(self, size: int) -> Iterator[Tensor]:
        """Parts of ``size`` images and a last one of the rest, each read when its turn comes."""
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class Folders:
    """The domains of a folder: called with a domain and "train" or "test", it gives pictures and labels (N,) int64.

    Args:
        data: a folder with one for each domain, in which there is one for each class.
        domains: of them, those that are read. All have the same classes; a label is the place of its class in the order
            of names, or what lists have.
        resize, crop, mean, std: as :func:`hdrq.calibrate.images.load_data` has them.
        test_share: of each class in each domain, one image at least; where there are lists they decide.
        split_seed: of the shares, and of the order of images.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …". An image that cannot be read is named when it is
        read.
    """

    data: Path
    domains: tuple[str, ...]
    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    test_share: float = 0.2
    split_seed: int = 0

    def __call__(self, domain: str, split: str) -> tuple[Pictures, Tensor]:
        checks.choice("domain", domain, self.domains)
        files, labels = self.listing[domain, checks.choice("split", split, SPLITS)]
        reader = image_reader(self.resize, self.crop, self.mean, self.std)
        return Pictures([self.data / file for file in files], reader), torch.tensor(labels)

    @property
    def facts(self) -> str:
        """What decides the tensors, but for the images' own contents and where the folder lies."""
        listed = hashlib.sha256(repr(sorted(self.listing.items())).encode()).hexdigest()
        return f"{self.names} {self.resize} {self.crop} {self.mean} {self.std} {listed}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the order of labels."""
        return self._found[1]

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def listing(self) -> dict[tuple[str, str], tuple[list[str], list[int]]]:
        """By domain and split: the files, from ``data`` on, and their labels, in an order that ``split_seed`` draws."""
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[tuple[str, str], tuple[list[str], list[int]]], tuple[str, ...]]:
        for domain in self.domains:
            if not (self.data / domain).is_dir():
                there = checks.listed(class_names(self.data)) or "none"
                raise FileNotFoundError(f"data must have a folder {domain!r}, a domain, got {self.data} with {there}")
        lists = [self.data / f"{domain}_{split}.txt" for domain in self.domains for split in SPLITS]
        absent = [path.name for path in lists if not path.is_file()]
        if absent and len(absent) < len(lists):
            here = "lists of both splits of all domains, or none"
            raise FileNotFoundError(f"data must have {here}, got {self.data} without {checks.listed(absent)}")
        pairs, classes = self._split() if absent else self._listed()
        shuffled = {}
        for (domain, split), each in pairs.items():
            order = _draw(self.split_seed, f"order {domain} {split}").permutation(len(each))
            shuffled[domain, split] = ([each[i][0] for i in order], [each[i][1] for i in order])
        return shuffled, classes

    def _split(self) -> tuple[dict[tuple[str, str], list[tuple[str, int]]], tuple[str, ...]]:
        """Each class of each domain, split by the seed."""
        checks.real("test_share", self.test_share, 0.01, 0.99)
        names = {domain: class_names(self.data / domain) for domain in self.domains}
        classes = sorted({name for found in names.values() for name in found})
        found: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for domain in self.domains:
            missing = [name for name in classes if name not in names[domain]]
            if missing:
                raise ValueError(
                    f"data must have every class in every domain, got none in {self.data / domain} of "
                    f"{checks.listed(missing)}; add them, remove them elsewhere, or write lists as DomainNet has them"
                )
            loose = [entry.name for entry in (self.data / domain).iterdir() if entry.suffix.lower() in IMAGES]
            if loose:
                what = f"{self.data / domain} with {checks.listed(sorted(loose))}"
                raise ValueError(f"data must have every image in the folder of its class, got {what}")
            rng = _draw(self.split_seed, domain)
            for label, name in enumerate(classes):
                files = [str(f.relative_to(self.data)) for f in image_files(self.data / domain / name)]
                if len(files) < 2:
                    where = self.data / domain / name
                    raise ValueError(f"data must have two images of a class in a domain at least, got one in {where}")
                order = rng.permutation(len(files))
                count = min(max(round(self.test_share * len(files)), 1), len(files) - 1)
                for split, part in (("test", order[:count]), ("train", order[count:])):
                    found.setdefault((domain, split), []).extend((files[i], label) for i in part)
        return found, tuple(classes)

    def _listed(self) -> tuple[dict[tuple[str, str], list[tuple[str, int]]], tuple[str, ...]]:
        """The lines of lists. A class need not be in every domain: numbers say which is which."""
        found: dict[tuple[str, str], list[tuple[str, int]]] = {}
        numbers: dict[str, int] = {}
        for domain in self.domains:
            for split in SPLITS:
                path = self.data / f"{domain}_{split}.txt"
                pairs = found[domain, split] = []
                for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                    if not text.strip():
                        continue
                    file, _, number = text.strip().rpartition(" ")
                    parts = Path(file).parts
                    if not number.isdecimal() or len(parts) < 3 or parts[0] != domain or ".." in parts:
                        form = f"'{domain}/<class>/<image> <number>'"
                        raise ValueError(f"line {line} of {path} must be {form}, got {text[:100]!r}")
                    if numbers.setdefault(parts[1], int(number)) != int(number):
                        was = numbers[parts[1]]
                        raise ValueError(
                            f"line {line} of {path} must have one number a class, got {text!r} after {was}"
                        )
                    if not (self.data / file).is_file():
                        raise FileNotFoundError(f"line {line} of {path} must name an image that is there, got {file}")
                    pairs.append((file, int(number)))
                if not pairs:
                    raise ValueError(f"{path} must have images, got none")
            both = {file for file, _ in found[domain, "train"]} & {file for file, _ in found[domain, "test"]}
            if both:
                raise ValueError(
                    f"lists of {domain} must share no image, got {len(both)}: {checks.listed(sorted(both))}"
                )
        names = {number: name for name, number in numbers.items()}
        if len(names) != len(numbers) or sorted(names) != list(range(len(names))):
            given = checks.listed(
                f"{name} {number}" for name, number in sorted(numbers.items(), key=lambda one: one[1])
            )
            raise ValueError(f"numbers of classes must be 0, 1, 2, … in the lists, one for each class, got {given}")
        return found, tuple(names[number] for number in range(len(names)))


def _draw(seed: int, what: str) -> np.random.Generator:
    """Of a name, so that one domain's split does not move with the others."""
    return np.random.default_rng([seed, *hashlib.sha256(what.encode()).digest()[:8]])
