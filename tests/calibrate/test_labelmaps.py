"""Label maps of street scenes, in folders that the tests make."""

import numpy as np
import pytest
import torch
from PIL import Image

from hdrq.calibrate.labelmaps import CLASSES, LAYOUTS, list_images, list_label_maps, load_label_maps

PLAIN = {"size": (4, 6), "mean": (0, 0, 0), "std": (1, 1, 1)}
CITYSCAPES = "road 7, sidewalk 8, building 11, wall 12, fence 13, pole 17, traffic light 19, traffic sign 20, "
CITYSCAPES += "vegetation 21, terrain 22, sky 23, person 24, rider 25, car 26, truck 27, bus 28, train 31, "
CITYSCAPES += "motorcycle 32, bicycle 33, parking 9, bridge 15, caravan 29"
LEVEL3 = "road 0, sidewalk 2, building 22, wall 14, fence 15, pole 20, traffic light 19, traffic sign 18, "
LEVEL3 += "vegetation 24, terrain 3, sky 25, person 4, rider 5, car 9, truck 10, bus 11, motorcycle 6, bicycle 7, "
LEVEL3 += "autorickshaw 8, curb 13, billboard 17, bridge 23"
IDD = "road 0, sidewalk 3, building 29, wall 20, fence 21, pole 26, traffic light 25, traffic sign 24, vegetation 32, "
IDD += "terrain 5, sky 33, person 6, rider 8, car 12, truck 13, bus 14, train 17, motorcycle 9, bicycle 10, parking 1, "
IDD += "autorickshaw 11, animal 7, out of roi 38"


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))).save(path)


def add(data, layout, number, labels, ending, split="val"):
    """An image whose red is its number, and its label map."""
    images, maps = (data / folder.format(split) for folder in (LAYOUTS[layout].images, LAYOUTS[layout].maps))
    within = f"{number % 2}" if "leftImg8bit" in str(images) else "."
    labels = labels if isinstance(labels, Image.Image) else np.asarray(labels, np.uint8)
    height, width = (labels.size[::-1] if isinstance(labels, Image.Image) else labels.shape)[:2]
    image = np.full((height, width, 3), (number, 0, 0), np.uint8)
    write(images / within / f"{number:03}{LAYOUTS[layout].ending}.png", image)
    write(maps / within / f"{number:03}{ending}", labels)


@pytest.mark.parametrize(
    ("layout", "ending", "table"),
    [
        ("cityscapes", "_gtFine_labelIds.png", CITYSCAPES),
        ("idd", "_gtFine_labellevel3Ids.png", LEVEL3),
        ("idd", "_gtFine_labelids.png", IDD),
        ("gta5", ".png", CITYSCAPES),
        ("cityscapes", "_gtFine_labelTrainIds.png", ", ".join(f"{name} {k}" for k, name in enumerate(CLASSES))),
        ("idd", "_gtFine_labelcsTrainIds.png", ", ".join(f"{name} {k}" for k, name in enumerate(CLASSES))),
        ("gta5", "_labelTrainIds.png", ", ".join(f"{name} {k}" for k, name in enumerate(CLASSES))),
    ],
)
def test_ids_are_classes(layout, ending, table, tmp_path):
    """Every id is the class of its name, and 255 where that is none of the 19."""
    named = [text.rpartition(" ") for text in table.split(", ")]
    ids = np.array([[int(number) for _, _, number in named] + [255]], np.uint8)
    expected = [CLASSES.index(name) if name in CLASSES else 255 for name, _, _ in named] + [255]
    split = LAYOUTS[layout].splits[-1]
    add(tmp_path, layout, 1, ids, ending, "val" if split == "test" else "train")
    ((images, labels),) = load_label_maps(tmp_path, layout, split, **{**PLAIN, "size": ids.shape})
    assert labels.dtype == torch.uint8 and labels[0, 0].tolist() == expected
    assert images.shape == (1, 3, *ids.shape)


def coloured(ids, first=0):
    """Ids as GTA5 has them: a palette whose entries are ids, in colours of Cityscapes; or later by ``first``."""
    colours = {7: (128, 64, 128), 11: (70, 70, 70), 23: (70, 130, 180), 26: (0, 0, 142), 31: (0, 80, 100)}
    others = (
        "8 244 35 232 12 102 102 156 13 190 153 153 17 153 153 153 19 250 170 30 20 220 220 0 21 107 142 35 22 152 "
    )
    others += "251 152 24 220 20 60 25 255 0 0 27 0 0 70 28 0 60 100 32 0 0 230 33 119 11 32 18 153 153 153 34 0 0 142"
    numbers = np.array(others.split(), int).reshape(-1, 4)
    colours |= {int(number): tuple(map(int, colour)) for number, *colour in numbers}
    picture = Image.fromarray(np.add(ids, first).astype(np.uint8), "P")
    picture.putpalette([value for k in range(256) for value in colours.get(k - first, (0, 0, 0))])
    return picture


def test_palettes_and_colours_of_gta5(tmp_path):
    """A palette's entry is an id where the colours say so; polegroups have the colour of poles, which is all that is
    known without the palette, and so has a palette of another order."""
    ids = [[7, 11, 23, 26, 31, 0, 18, 34]]
    add(tmp_path, "gta5", 1, coloured(ids), ".png", "train")
    add(tmp_path, "gta5", 2, coloured(ids).convert("RGB"), ".png", "train")
    add(tmp_path, "gta5", 3, coloured(ids, 50), ".png", "train")
    ((_, labels),) = load_label_maps(tmp_path, "gta5", "train", **{**PLAIN, "size": (1, 8)})
    assert labels[0, 0].tolist() == [0, 2, 10, 13, 16, 255, 255, 255]
    assert labels[1, 0].tolist() == labels[2, 0].tolist() == [0, 2, 10, 13, 16, 255, 5, 13]


def test_images_meet_their_own_label_maps(tmp_path):
    for number in range(5):
        add(tmp_path, "cityscapes", number, np.full((4, 6), 7 + number % 2), "_gtFine_labelIds.png")
    batches = list(load_label_maps(tmp_path, "cityscapes", batch_size=2, **PLAIN))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    numbers = (images[:, 0, 0, 0] * 255).round().long()
    assert sorted(numbers.tolist()) == [*range(5)] and torch.equal(labels[:, 0, 0].long(), numbers % 2)
    (images, _), *rest = load_label_maps(tmp_path, "cityscapes", limit=2, **PLAIN)
    assert len(images) == 2 and not rest


def test_sizes_are_those_that_are_asked_for(tmp_path):
    """Images are interpolated and labels never are: between classes 0 and 2 none is 1."""
    labels = np.repeat([[0, 2, 0, 2]], 3, 0)
    write(tmp_path / "images" / "val" / "a.jpg", np.repeat(np.uint8(labels * 100)[..., None], 3, 2))
    write(tmp_path / "labels" / "val" / "a.png", np.uint8(labels))
    ((images, maps),) = load_label_maps(tmp_path, "plain", size=(6, 9), label_size=(5, 11))
    assert images.shape == (1, 3, 6, 9) and maps.shape == (1, 5, 11) and set(maps.unique().tolist()) == {0, 2}
    ((_, maps),) = load_label_maps(tmp_path, "plain", size=(3, 4))
    assert torch.equal(maps[0], torch.from_numpy(labels).to(torch.uint8))


def test_unlabelled_images_need_no_label_maps(tmp_path):
    write(tmp_path / "leftImg8bit" / "train" / "a" / "1_leftImg8bit.png", np.zeros((4, 6, 3), np.uint8))
    assert [file.name for file in list_images(tmp_path, "idd", "train")] == ["1_leftImg8bit.png"]
    with pytest.raises(FileNotFoundError, match=r"1_gtFine_labelcsTrainIds.png or 1_gtFine_labellevel3Ids.png or 1_gt"):
        list_label_maps(tmp_path, "idd", "train")


def damaged(data, number, change):
    (path,) = data.rglob(f"{number:03}_gtFine_labelIds.png")
    change(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "002_leftImg8bit.png must have a label map as others, got no .*002_gtFine_labelI"),
        (lambda path: write(path, np.full((4, 6), 35, np.uint8)), "labelIds.png must have ids of that kind, got 35 in"),
        (lambda path: write(path, np.full((4, 6), 300, np.uint16)), "must have ids of that kind, got 300 in .*002_gtF"),
        (
            lambda path: write(path, np.zeros((4, 5), np.uint8)),
            "the sizes of their images, got 4 × 5 and 4 × 6 of .*002",
        ),
        (lambda path: write(path, np.zeros((4, 6, 3), np.uint8)), "one whole number a pixel, got .*002.* of mode RGB"),
        (lambda path: path.write_bytes(b"no"), "data must be images, got .*002_gtFine_labelIds.png, which cannot be"),
    ],
)
def test_what_is_wrong_is_named(change, message, tmp_path):
    for number in range(4):
        add(tmp_path, "cityscapes", number, np.full((4, 6), 7), "_gtFine_labelIds.png")
    damaged(tmp_path, 2, change)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        list(load_label_maps(tmp_path, "cityscapes", **PLAIN))


def test_unknown_colours_are_named(tmp_path):
    add(tmp_path, "gta5", 1, Image.new("RGB", (6, 4), (1, 2, 3)), ".png", "train")
    with pytest.raises(ValueError, match=r"must have those of Cityscapes, got \(1, 2, 3\) in .*001.png"):
        list(load_label_maps(tmp_path, "gta5", "train", **PLAIN))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ade",), {}, "layout must be one of 'cityscapes', 'idd', 'gta5', 'plain', got 'ade'"),
        (("gta5", "test"), {}, "split must be one of 'train', got 'test'"),
        (("cityscapes",), {}, "data must have the folder leftImg8bit/val of cityscapes, got .* without"),
        (("idd", "train"), {}, r"data must have images named \*_leftImg8bit.\* of idd, got none in"),
        (("plain", "train"), {"size": (0, 4)}, r"size must be in \[1, 32768\], got 0"),
        (("plain", "train"), {"size": (4,)}, r"size must be height and width, got \(4,\)"),
        (("plain", "train"), {"label_size": (2**15, 2**15)}, "label_size must be of at most"),
        (("plain", "train"), {"limit": 0}, "limit must be"),
    ],
)
def test_bad_input(arguments, options, message, tmp_path):
    write(tmp_path / "leftImg8bit" / "train" / "a" / "1.png", np.zeros((4, 6, 3), np.uint8))
    add(tmp_path, "plain", 1, np.zeros((4, 6)), ".png", "train")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        next(load_label_maps(tmp_path, *arguments, **options))
