"""What a model was made of, told from the header of its file alone."""

import hashlib
import json

import pytest
from networks import SAMPLES, mergeable
from typer.testing import CliRunner

import hdrq
from hdrq.checkpoint.history import history
from hdrq.cli import app
from hdrq.merging.files import merge_files


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merge of a merge and a third model, and the files it was made of."""
    folder = tmp_path_factory.mktemp("history")
    for k in range(3):
        model = hdrq.quantize(mergeable(k), SAMPLES, "rtn", seed=k, progress=False)
        hdrq.save(model, folder / str(k))
    merge_files([folder / "0", folder / "1"], folder / "pair", rule="half-up")
    merge_files([folder / "pair", folder / "2"], folder / "all", seed=7)
    return folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_parent_by_the_hash_of_its_file(merged):
    result = CliRunner().invoke(app, ["inspect", str(merged / "all"), "--history"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "merged: rule systematic, seed 7, weights [0.5, 0.5]",
        f"  merged: rule half-up, seed 0, weights [0.5, 0.5]  ({digest(merged / 'pair')})",
        f"    quantized: recipe rtn, bits W4A4, seed 0  ({digest(merged / '0')})",
        f"    quantized: recipe rtn, bits W4A4, seed 1  ({digest(merged / '1')})",
        f"  quantized: recipe rtn, bits W4A4, seed 2  ({digest(merged / '2')})",
    ]
    told = json.loads(CliRunner().invoke(app, ["inspect", str(merged / "all"), "--history", "--json"]).output)
    assert told["parents"][0]["parents"][1]["sha256"] == digest(merged / "1")


def test_no_tensor_is_read(merged, tmp_path):
    """A file whose tensors are damaged tells its history, and fails the inspection."""
    data = bytearray((merged / "all").read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "damaged"), "--history"]).exit_code == 0
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "damaged")]).exit_code != 0


def test_the_whole_inspection_tells_it_too(merged):
    output = CliRunner().invoke(app, ["inspect", str(merged / "all")]).output
    assert f"\n    quantized: recipe rtn, bits W4A4, seed 1  ({digest(merged / '1')})\n" in output


def test_strange_manifests():
    assert history({"models": [3, {"merge": {}}], "merge": None}).what == "of unknown origin"
    deep = {}
    for _ in range(300):
        deep = {"parent": deep, "added": {"changes": [1], "rule": "nearest"}}
    assert sum(1 for _ in history(deep).lines()) == 101
    assert history(deep).what == "1 change added: rule nearest"
