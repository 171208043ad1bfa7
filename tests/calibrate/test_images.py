"""Pictures as they lie on disks."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hdrq.calibrate.images import load_data, load_labelled

SIZE = {"resize": 8, "crop": 8}
PLAIN = {**SIZE, "mean": (0, 0, 0), "std": (1, 1, 1)}


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "ramp.png")
    assert np.abs(load_data(tmp_path, **PLAIN)[0, 0].numpy() - ramp).max() < 0.01


def test_palettes_are_read_as_colours(tmp_path):
    picture = Image.new("RGB", (8, 8), (255, 0, 0)).convert("P")
    picture.save(tmp_path / "a.png")
    assert load_data(tmp_path, **PLAIN)[0, :, 0, 0].tolist() == [1, 0, 0]


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    for name in ("real", "data"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "real")
    assert [y.tolist() for _, y in load_labelled(tmp_path / "data", **SIZE)] == [[0, 1]]
    (tmp_path / "data" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"images of every class.*cat"):
        next(load_labelled(tmp_path / "data", **SIZE))


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"a\.png.*12000 × 12000"):
        load_data(tmp_path, **SIZE)
    Image.new("RGB", (1, 20_000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png.*256 × 5120000"):
        load_data(tmp_path)
