"""Images with label maps from folders, as Cityscapes, IDD and GTA5 have them: the 19 classes of Cityscapes' benchmark.

    cityscapes   <data>/leftImg8bit/<split>/<city>/*_leftImg8bit.png
                 <data>/gtFine/<split>/<city>/*_gtFine_labelTrainIds.png, or *_gtFine_labelIds.png
    idd          the same folders; *_gtFine_labelcsTrainIds.png, *_gtFine_labellevel3Ids.png or *_gtFine_labelids.png
    gta5         <data>/images/*.png and <data>/labels/*.png, of ids or colours; or labels/*_labelTrainIds.png
    plain        <data>/images/<split>/… and <data>/labels/<split>/…, of the same names: classes, 255 for none

Of several kinds of label maps the first named here is read. The split "test" is the folder "val", of which labels are
public; all of GTA5 is "train". IDD's label maps are made from its polygons by createLabels.py of AutoNUE/public-code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hdrq import checks
from hdrq.calibrate.data import spread
from hdrq.calibrate.images import MEAN, PIXELS, STD, image_files, normalization, open_image, rgb

CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
UNLABELLED = 255
SPLITS = {"train": "train", "test": "val"}  # and their folders
UNKNOWN = 2**15 - 1


def _table(ids: Sequence[int | None], others: Sequence[int] = ()) -> np.ndarray:
    """The class of each id, int16 (256,), of the ids of classes, and of others that are not evaluated."""
    table = np.full(256, UNKNOWN, np.int16)
    table[[*others, UNLABELLED]] = UNLABELLED
    for label, number in enumerate(ids):
        if number is not None:
            table[number] = label
    return table


_TRAIN = _table(range(19))
_CITYSCAPES = _table((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(35))
# IDD's fallback of what one cannot drive on counts as terrain, as in its own csTrainIds. Its level 3 has trains among
# vehicles that none of the 19 is, rail tracks among that fallback, animals among persons, polegroups among poles.
_IDD = _table((0, 3, 29, 20, 21, 26, 25, 24, 32, 5, 33, 6, 8, 12, 13, 14, 17, 9, 10), range(40))
_LEVEL3 = _table((0, 2, 22, 14, 15, 20, 19, 18, 24, 3, 25, 4, 5, 9, 10, 11, None, 6, 7), range(26))
_COLOURS = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30)),
    *((220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142)),
    *((0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
_UNLABELLED_COLOURS = (
    *((0, 0, 0), (20, 20, 20), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180)),
    *((150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110)),
)


@dataclass(frozen=True)
class Kind:
    """Label maps of one kind: how their names end, where those of images have :attr:`Layout.ending`; and their ids."""

    ending: str
    table: np.ndarray
    coloured: bool = False


@dataclass(frozen=True)
class Layout:
    """Where a dataset has its images and label maps."""

    images: str
    maps: str
    ending: str  # of an image's name, before the suffix
    kinds: tuple[Kind, ...]
    classes: tuple[str, ...] | None = CLASSES  # None: what there is
    splits: tuple[str, ...] = ("train", "test")


LAYOUTS = {
    "cityscapes": Layout(
        *("leftImg8bit/{}", "gtFine/{}", "_leftImg8bit"),
        (Kind("_gtFine_labelTrainIds.png", _TRAIN), Kind("_gtFine_labelIds.png", _CITYSCAPES)),
    ),
    "idd": Layout(
        *("leftImg8bit/{}", "gtFine/{}", "_leftImg8bit"),
        (
            Kind("_gtFine_labelcsTrainIds.png", _TRAIN),
            Kind("_gtFine_labellevel3Ids.png", _LEVEL3),
            Kind("_gtFine_labelids.png", _IDD),
        ),
    ),
    "gta5": Layout(
        *("images", "labels", ""),
        (Kind("_labelTrainIds.png", _TRAIN), Kind(".png", _CITYSCAPES, coloured=True)),
        splits=("train",),
    ),
    "plain": Layout("images/{}", "labels/{}", "", (Kind(".png", _table(range(256))),), classes=None),
}


def list_images(data: str | os.PathLike, layout: str, split: str) -> list[Path]:
    """The images of a split, "train" or "test", in the order of their names; no label map is looked for.

    Raises:
        FileNotFoundError, ValueError: "X must be …, got …".
    """
    form = LAYOUTS[checks.choice("layout", layout, tuple(LAYOUTS))]
    checks.choice("split", split, form.splits)
    folder = Path(data) / form.images.format(SPLITS[split])
    if not folder.is_dir():
        raise FileNotFoundError(f"data must have the folder {folder.relative_to(data)} of {layout}, got {data} without")
    files = [file for file in image_files(folder) if file.stem.endswith(form.ending)]
    if not files:
        raise ValueError(f"data must have images named *{form.ending}.* of {layout}, got none in {folder}")
    return files


def list_label_maps(data: str | os.PathLike, layout: str, split: str) -> tuple[list[tuple[Path, Path]], Kind]:
    """The images of a split, each with its label map, and of which kind these are.

    Raises:
        FileNotFoundError, ValueError: "X must be …, got …"; an image without a label map is named.
    """
    form, files = LAYOUTS[checks.choice("layout", layout, tuple(LAYOUTS))], list_images(data, layout, split)
    images, maps = (Path(data) / folder.format(SPLITS[split]) for folder in (form.images, form.maps))

    def map_of(file: Path, kind: Kind) -> Path:
        return maps / file.relative_to(images).parent / f"{file.stem.removesuffix(form.ending)}{kind.ending}"

    kinds = [kind for kind in form.kinds if map_of(files[0], kind).is_file()]
    if not kinds:
        wanted = [map_of(files[0], kind) for kind in form.kinds]
        names = " or ".join(path.name for path in wanted)
        raise FileNotFoundError(f"{files[0]} must have a label map, got no {names} in {wanted[0].parent}")
    kind = kinds[0]
    pairs = [(file, map_of(file, kind)) for file in files]
    missing = [(file, path) for file, path in pairs if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0][0]} must have a label map as others, got no {missing[0][1]}")
    return pairs, kind


def exact_reader(
    size: tuple[int, int], mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Callable[[Sequence[Path]], torch.Tensor]:
    """A function that makes of files float32 (N, 3, H, W): bilinear to ``size``, (H, W), and ``(x/255 − mean)/std``."""
    height, width = checked_size("size", size)
    normalized = normalization(mean, std)
    bilinear = Image.Resampling.BILINEAR
    return lambda files: normalized(
        [np.asarray(open_image(file, rgb).resize((width, height), bilinear)) for file in files]
    )


def map_reader(kind: Kind, size: tuple[int, int]) -> Callable[[Sequence[tuple[Path, Path]]], torch.Tensor]:
    """A function that makes of images with their label maps the classes of pixels, uint8 (N, H, W); 255 where none is.

    Label maps are resized to ``size``, (H, W), by the nearest pixel. Of an image the size alone is read.

    Raises:
        ValueError: from the function: a file cannot be read, has an id that is none of its kind's, or another size than
            its image; it is named.
    """
    height, width = checked_size("label_size", size)

    def read(pair: tuple[Path, Path]) -> np.ndarray:
        image, path = pair
        picture = open_image(path, lambda file: file.copy())
        own = open_image(image, lambda file: file).size
        if picture.size != own:
            sizes = " and ".join("{1} × {0}".format(*each) for each in (picture.size, own))
            raise ValueError(f"label maps must have the sizes of their images, got {sizes} of {path}; leave it out")
        classes = Image.fromarray(_classes(picture, kind, path).astype(np.uint8))
        return np.asarray(classes.resize((width, height), Image.Resampling.NEAREST))

    return lambda pairs: torch.from_numpy(np.stack([read(pair) for pair in pairs]))


def load_label_maps(
    path: str | os.PathLike,
    layout: str,
    split: str = "test",
    *,
    size: tuple[int, int] = (512, 1024),
    label_size: tuple[int, int] | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    limit: int | None = None,
    batch_size: int = 4,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images, float32 (N, 3, H, W), and classes of their pixels, uint8 (N, h, w), 255 where there is none.

    Args:
        path, layout: a folder, and how it is laid out: a name of :data:`LAYOUTS`, as this module's text has them.
        size: (H, W) to which images are resized, bilinearly, whatever their shape.
        label_size: (h, w) to which label maps are, by the nearest pixel; by default as images. Figures of Cityscapes
            are told at its own, (1024, 2048).
        limit: how many images at most, evenly over all in the order of their names.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …".
    """
    checks.integer("batch_size", batch_size, 1, 2**31)
    if limit is not None:
        checks.integer("limit", limit, 1, 2**31)
    pairs, kind = list_label_maps(path, layout, split)
    images, maps = exact_reader(size, mean, std), map_reader(kind, size if label_size is None else label_size)
    pairs = [pairs[i] for i in spread(len(pairs), limit)]
    for first in range(0, len(pairs), batch_size):
        some = pairs[first : first + batch_size]
        yield images([image for image, _ in some]), maps(some)


def checked_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        TypeError, ValueError: they are no two lengths of a picture that is not too large.
    """
    if isinstance(size, str) or len(size) != 2:
        raise ValueError(f"{name} must be height and width, got {size!r:.100}")
    height, width = (checks.integer(name, side, 1, 2**15) for side in size)
    if height * width > PIXELS:
        raise ValueError(f"{name} must be of at most {PIXELS:,} pixels, got {height} × {width}")
    return height, width


def _classes(picture: Image.Image, kind: Kind, path: Path) -> np.ndarray:
    """The class of each pixel, (H, W)."""
    if kind.coloured and picture.mode != "L" and not _has_palette_of_ids(picture, kind):
        return _of_colours(np.asarray(picture.convert("RGB")), path)
    ids = np.asarray(picture)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"label maps must have one whole number a pixel, got {path} of mode {picture.mode}")
    classes = np.where((ids < 0) | (ids > 255), UNKNOWN, kind.table[ids.clip(0, 255)])
    if len(wrong := ids[classes == UNKNOWN]):
        raise ValueError(f"label maps named *{kind.ending} must have ids of that kind, got {wrong[0]} in {path}")
    return classes


def _has_palette_of_ids(picture: Image.Image, kind: Kind) -> bool:
    """Whether a palette's entries are ids: the colour of each class's id is the class's."""
    if picture.mode != "P":
        return False
    palette = np.array(picture.getpalette("RGB"), int).reshape(-1, 3)
    numbers = [int(np.flatnonzero(kind.table == label)[0]) for label in range(len(CLASSES))]
    return len(palette) > max(numbers) and bool((palette[numbers] == _COLOURS).all())


def _of_colours(pixels: np.ndarray, path: Path) -> np.ndarray:
    known = {colour: label for label, colour in enumerate(_COLOURS)} | dict.fromkeys(_UNLABELLED_COLOURS, UNLABELLED)
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    found, places = np.unique(packed, return_inverse=True)
    colours = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in found]
    if wrong := [colour for colour in colours if colour not in known]:
        raise ValueError(f"label maps in colours must have those of Cityscapes, got {wrong[0]} in {path}")
    return np.array([known[colour] for colour in colours])[places.reshape(packed.shape)]
