"""Folders of domains of classes: splits that stay, lists that decide, and what is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdrq.reproduce.folders import Folders

DOMAINS = ("Art", "Real World")
CLASSES = ("Bike", "Cup", "Pen")


def write(path: Path, colour=(0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), colour).save(path)


@pytest.fixture
def data(tmp_path):
    """Ten pictures of each class in each domain, of one colour each that tells them apart."""
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(CLASSES):
            for k in range(10):
                write(tmp_path / domain / name / f"{k}.png", (d * 100, c * 100, k * 20))
    return tmp_path


def folders(data, **options):
    return Folders(data, DOMAINS, resize=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1), **options)


def colours(pictures):
    return {tuple(round(255 * v) for v in x[:, 0, 0].tolist()) for x in pictures[:]}


def test_labels_are_places_of_classes_and_splits_share_nothing(data):
    load = folders(data, test_share=0.3)
    assert load.names == CLASSES
    for d, domain in enumerate(DOMAINS):
        seen = {}
        for split, count in (("train", 21), ("test", 9)):
            pictures, labels = load(domain, split)
            assert len(pictures) == len(labels) == count and labels.dtype == torch.int64
            assert labels.bincount().tolist() == [count // 3] * 3
            for x, label in zip(pictures[:], labels, strict=True):
                assert [round(255 * v) for v in x[:2, 3, 3].tolist()] == [d * 100, int(label) * 100]
            seen[split] = colours(pictures)
        assert not seen["train"] & seen["test"] and len(seen["train"] | seen["test"]) == 30


def test_splits_are_drawn_by_the_seed_alone(data):
    first, again, other = folders(data), folders(data), folders(data, split_seed=1)
    assert first.listing == again.listing and first.facts == again.facts
    assert first.listing != other.listing and first.facts != other.facts
    alone = Folders(data, DOMAINS[1:], 8, 8)  # another domain more or less moves no image
    assert all(first.listing[DOMAINS[1], split] == alone.listing[DOMAINS[1], split] for split in ("train", "test"))
    labels = first("Art", "train")[1].tolist()
    assert labels != sorted(labels)  # so that the first thousand are of all classes


def test_pictures_are_read_in_parts(data):
    pictures, _ = folders(data)("Art", "train")
    whole = pictures[:]
    assert whole.shape == (24, 3, 8, 8) and whole.dtype == torch.float32
    assert torch.equal(torch.cat(list(pictures.split(7))), whole)
    assert [len(part) for part in pictures.split(7)] == [7, 7, 7, 3]
    index = torch.tensor([5, 0, 23])
    assert torch.equal(pictures[index], whole[index]) and torch.equal(pictures[-3:], whole[-3:])


@pytest.fixture
def listed(data):
    """Lists that turn the order of classes round, and leave one class out of a domain, as DomainNet's do."""
    for domain in DOMAINS:
        for split, kept in (("train", range(6)), ("test", range(6, 9))):
            lines = [
                f"{domain}/{name}/{k}.png {2 - c}"
                for c, name in enumerate(CLASSES)
                for k in kept
                if (domain, name) != ("Art", "Cup")
            ]
            (data / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return data


def test_lists_decide(listed):
    load = folders(listed)
    assert load.names == CLASSES[::-1]
    assert load("Art", "train")[1].bincount(minlength=3).tolist() == [6, 0, 6]
    pictures, labels = load("Real World", "test")
    assert labels.bincount().tolist() == [3, 3, 3]
    assert colours(pictures) == {(100, c * 100, k * 20) for c in range(3) for k in range(6, 9)}


def spoil(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number] = text
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Art/Bike/0.png", r"line 3 of .*Art_train.txt must be 'Art/<class>/<image> <number>', got 'Art/Bike/0.png'"),
        ("Art/../Bike/0.png 2", "line 3 of .* must be 'Art/<class>/<image> <number>'"),
        ("Real World/Bike/0.png 2", "line 3 of .* must be 'Art/<class>/<image> <number>'"),
        ("Art/Bike/2.png 1", "line 3 of .* must have one number a class, got 'Art/Bike/2.png 1' after 2"),
        ("Art/Bike/99.png 2", "line 3 of .* must name an image that is there, got Art/Bike/99.png"),
        ("Art/Bike/7.png 2", "lists of Art must share no image, got 1: Art/Bike/7.png"),
        ("Art/Cup/2.png 7", "line 4 of|numbers of classes must be|one number a class"),
    ],
)
def test_wrong_lists_are_refused(line, message, listed):
    spoil(listed / "Art_train.txt", 2, line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folders(listed).listing  # noqa: B018


def test_numbers_of_classes_are_all_there(listed):
    for path in listed.glob("*.txt"):
        path.write_text(path.read_text().replace(".png 2", ".png 5"))
    with pytest.raises(ValueError, match=r"numbers of classes must be 0, 1, 2, .* got Pen 0; Cup 1; Bike 5"):
        folders(listed).listing  # noqa: B018


def test_what_is_missing_is_named(data, listed):
    (data / "Art_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists of both splits of all domains, or none, got .* Art_test.txt"):
        folders(data).listing  # noqa: B018
    for path in data.glob("*.txt"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"data must have a folder 'Sketch', a domain, got .* with Art; Real World"
    ):
        Folders(data, ("Art", "Sketch")).listing  # noqa: B018
    for path in (data / "Art" / "Cup").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"data must be a folder of images .* got none in .*Cup"):
        folders(data).listing  # noqa: B018
    (data / "Art" / "Cup").rmdir()
    with pytest.raises(ValueError, match=r"data must have every class in every domain, got none in .*Art of Cup"):
        folders(data).listing  # noqa: B018


def test_a_class_of_one_image_and_an_image_of_no_class_are_refused(data):
    write(data / "Art" / "Sole" / "0.png")
    write(data / "Real World" / "Sole" / "0.png")
    with pytest.raises(ValueError, match=r"two images of a class in a domain at least, got one in .*Sole"):
        folders(data).listing  # noqa: B018
    write(data / "Art" / "loose.png")
    with pytest.raises(ValueError, match=r"every image in the folder of its class, got .*Art with loose.png"):
        folders(data).listing  # noqa: B018


def test_a_corrupt_image_is_named(data):
    (data / "Art" / "Cup" / "3.png").write_bytes(b"\x89PNG no picture")
    load = folders(data)
    with pytest.raises(ValueError, match=r"data must be images, got .*Cup/3.png, which cannot be read"):
        [load("Art", split)[0][:] for split in ("train", "test")]


def test_a_share_of_each_class_is_kept_for_both_splits(data):
    for share, count in ((0.01, 1), (0.99, 9)):
        assert np.bincount(folders(data, test_share=share)("Art", "test")[1]).tolist() == [count] * 3
    for wrong in (0, 1.0, "half"):
        with pytest.raises((TypeError, ValueError), match="test_share must be"):
            folders(data, test_share=wrong).listing  # noqa: B018
    with pytest.raises(ValueError, match="split must be one of 'train', 'test'"):
        folders(data)("Art", "val")
