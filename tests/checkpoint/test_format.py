"""The file: whole or not at all, one tensor at a time, and thousands of altered ones refused."""

import json
import os
import random

import pytest
import torch
from torch import nn

import hdrq

pytest.importorskip("safetensors")

from safetensors import safe_open

from hdrq.checkpoint import format
from hdrq.checkpoint.format import Reader, Writer, _text_hash

X = torch.randn((16, 5), generator=torch.Generator().manual_seed(0))
EMPTY = {"folded": {}, "weights": {}, "inputs": {}, "shared": {}}
SPECS = {
    "a": (torch.int8, (3, 5)),
    "b": (torch.bfloat16, (7,)),
    "c": (torch.float64, ()),
    "d": (torch.float32, (2, 0, 3)),
    "e": (torch.bool, (3,)),
}


def tensors():
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randint(0, 2, shape, generator=generator).to(dtype) for n, (dtype, shape) in SPECS.items()}


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def write(path, values, manifest=EMPTY, specs=SPECS):
    with Writer(path, specs, manifest) as file:
        for name, value in values.items():
            file.write(name, value)


def test_any_order_gives_one_file_that_safetensors_reads(tmp_path):
    values = tensors()
    write(tmp_path / "one", values)
    write(tmp_path / "two", dict(reversed(values.items())), specs=dict(reversed(SPECS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as theirs, Reader(tmp_path / "one") as ours:
        assert set(theirs.keys()) == ours.specs.keys() == SPECS.keys()
        assert ours.size == (tmp_path / "one").stat().st_size
        for name, value in values.items():
            assert ours.specs[name] == SPECS[name]
            for read in (theirs.get_tensor(name), ours.tensor(name)):
                assert read.dtype == value.dtype and torch.equal(read, value)


@pytest.mark.parametrize("name", ["a", None])
def test_a_writer_that_fails_leaves_nothing(tmp_path, name):
    (tmp_path / "file").write_bytes(b"before")
    values = tensors()
    if name is None:
        del values["c"]
        message = "every tensor must be written, got none for c"
    else:
        values[name] = values[name].float()
        message = r"a must be \(torch.int8, \(3, 5\)\), got torch.float32 of shape"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "file", values)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"before"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, place, data):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Writer(tmp_path / "file", SPECS, EMPTY) as file:
        monkeypatch.setattr(Writer, "_write", full)
        file.write("a", tensors()["a"])
    assert not any(tmp_path.iterdir())


def test_a_manifest_that_does_not_fit_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint must hold 'x.weight.codes', got none"):
        Writer(tmp_path / "file", SPECS, {**EMPTY, "weights": {"x": {"range": [-8, 7], "axis": None, "shape": [3]}}})
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("format") / "model"
    hdrq.save(hdrq.quantize(net(), X, "rtn", bits={"0": "W4A4", "*": "W8A8"}, per_channel=True), path)
    return path


def outcome(path):
    """What a file loads as: outputs; or None where it is refused."""
    try:
        return hdrq.load(path, net())(X)
    except ValueError as error:
        assert "must" in str(error)
        return None


def test_altered_bytes(checkpoint, tmp_path):
    """Any flipped bits, cuts, insertions: refused, or without effect; nothing else is ever raised."""
    data, want, draw, path = checkpoint.read_bytes(), outcome(checkpoint), random.Random(0), tmp_path / "altered"
    refused = 0
    for _ in range(1500):
        altered, kind = bytearray(data), draw.randrange(4)
        where = draw.randrange(len(data) if draw.random() < 0.5 else 64)
        if kind == 0:
            altered[where] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del altered[where : where + draw.randrange(1, 9)]
        elif kind == 2:
            altered[where:where] = draw.randbytes(draw.randrange(1, 9))
        else:
            altered = altered[:where]
        path.write_bytes(altered)
        got = outcome(path)
        refused += got is None
        assert got is None or torch.equal(got, want)
    assert refused > 1450


HUGE = 2**60
HOSTILE = [0, -1, 1, HUGE, -HUGE, 0.5, 1e400, None, True, "", "8", [], [HUGE], [HUGE, HUGE, 0], [-1, -1], {}, [[[[]]]]]


def places(tree, path=()):
    """The way to every value inside a tree of JSON."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def altered(tree, path, value):
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


def test_thousands_of_hostile_headers(checkpoint, tmp_path):
    """Every entry of the header and of the manifest in turn, with the hash of the manifest made to agree."""
    data, want, path = checkpoint.read_bytes(), outcome(checkpoint), tmp_path / "altered"
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    manifest = json.loads(header["__metadata__"]["hdrq"])
    free = ("recipe", "bits", "seed", "fingerprints", "hdrq")  # says how the model was made; no tensor depends on it

    def try_(header, manifest):
        text = json.dumps(manifest)
        entries = json.dumps({**header, "__metadata__": {"hdrq": text, "sha256": _text_hash(text)}}).encode()
        path.write_bytes(len(entries).to_bytes(8, "little") + entries + body)
        return outcome(path)

    count = 0
    for value in HOSTILE:
        for place in places({k: v for k, v in manifest.items() if k not in free}):
            got = try_(header, altered(manifest, place, value))
            assert got is None or torch.equal(got, want) or place[0] in ("weights", "inputs")
            count += 1
        for place in places({k: v for k, v in header.items() if k != "__metadata__"}):
            got = try_(altered(header, place, value), manifest)
            assert got is None or torch.equal(got, want)
            count += 1
    assert count > 1500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '"\\ud800"', "NaN", "null"])
def test_hostile_manifests_that_are_no_table(checkpoint, tmp_path, text):
    data = checkpoint.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = json.dumps({**header, "__metadata__": {"hdrq": text, "sha256": "0" * 64}}).encode()
    (tmp_path / "file").write_bytes(len(entries).to_bytes(8, "little") + entries + data[8 + length :])
    assert outcome(tmp_path / "file") is None


def test_a_file_that_is_cut_while_it_is_read_is_refused(checkpoint, tmp_path):
    """Not mapped: reading past the end of a mapped file ends the process."""
    (tmp_path / "file").write_bytes(checkpoint.read_bytes())
    with Reader(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size // 2)
        with pytest.raises(ValueError, match=r"got '.*file': tensor .* ends before its last byte"):
            for name in file.specs:
                file.tensor(name)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"got '.*pipe', a device, a pipe or a socket"):
        Reader(tmp_path / "pipe")


def test_a_header_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "LONGEST_HEADER", 2000)
    write(tmp_path / "file", tensors())
    with pytest.raises(ValueError, match="header must be of at most 2,000 bytes to be read, got"):
        write(tmp_path / "long", tensors(), {**EMPTY, "recipe": "x" * 2000})
    assert not (tmp_path / "long").exists()
