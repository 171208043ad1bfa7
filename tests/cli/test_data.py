"""What ``--data`` takes: folders of images, and tensors in files."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("typer")

from PIL import Image
from safetensors.torch import save_file

from hdrq.calibrate.images import MEAN, STD, load_data


def test_images_are_resized_cropped_and_normalized(place):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45] = (255, 0, 127)  # the middle
    (place / "flat").mkdir()
    Image.fromarray(pixels).save(place / "flat" / "wide.png")
    x = load_data(place / "flat", resize=30, crop=20)
    assert x.shape == (1, 3, 20, 20) and x.dtype == torch.float32
    want = (torch.tensor([1.0, 0.0, 127 / 255]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(x[0], want[:, None, None].expand(3, 20, 20))
    small = load_data(place / "flat", resize=10, crop=10, mean=(0, 0, 0), std=(1, 1, 1))  # 20 x 10: pixels 5 to 15
    assert small.shape == (1, 3, 10, 10) and small[0, 0, :, 1:9].min() > 0.95


def test_limit_takes_every_class(place):
    everything = load_data(place / "images", resize=20, crop=16)
    assert everything.shape == (20, 3, 16, 16)
    assert torch.equal(load_data(place / "images", resize=20, crop=16, limit=4), everything[[0, 5, 10, 15]])


def test_grey_images_have_three_channels(place):
    (place / "grey").mkdir()
    Image.fromarray(np.full((20, 20), 51, np.uint8)).save(place / "grey" / "a.jpg")
    x = load_data(place / "grey", resize=20, crop=16, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(x, torch.full((1, 3, 16, 16), 0.2), atol=0.01, rtol=0)


def test_tensors_are_taken_as_they_are(place):
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save(place / "x.npy", x.numpy())
    save_file({"images": x}, place / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        assert torch.equal(load_data(place / name), x)
        assert torch.equal(load_data(place / name, limit=3), x[[0, 2, 4]])
    np.save(place / "swapped.npy", x.numpy().astype(">f4"))
    assert torch.equal(load_data(place / "swapped.npy"), x)


def test_data_that_is_none(place):
    (place / "empty").mkdir()
    (place / "images" / "mug" / "0.png").write_bytes(b"no image")
    np.save(place / "codes.npy", np.zeros((3, 4), np.int64))
    np.save(place / "objects.npy", np.array([{}]), allow_pickle=True)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, place / "two.safetensors")
    for name, options, error, message in (
        ("nowhere", {}, FileNotFoundError, "data must be a folder or a file, got nowhere, which does not exist"),
        ("empty", {}, ValueError, "data must be a folder of images .* got none in empty"),
        ("images", {}, ValueError, "data must be images, got images/mug/0.png, which cannot be read"),
        ("images", {"resize": 8, "crop": 9}, ValueError, r"crop must be in \[1, 8\], got 9"),
        ("images", {"std": (0, 1, 1)}, ValueError, "mean and std must be 3 numbers each, std positive"),
        ("codes.npy", {}, TypeError, r"data must be floats, \(N, …\), got torch.int64 of shape \(3, 4\)"),
        ("objects.npy", {}, ValueError, "Object arrays cannot be loaded"),
        ("two.safetensors", {}, ValueError, "data must be a file of one tensor, got 2 in two.safetensors: a, b"),
        ("tinynet.py", {}, ValueError, "data must be a folder, a .npy or a .safetensors file, got tinynet.py"),
    ):
        with pytest.raises(error, match=message):
            load_data(name, **options)
