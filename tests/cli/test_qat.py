"""``hdrq qat``: from folders of images to quantized models, tables and figures, and refused with a word why."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

import hdrq
from hdrq.evaluate.metrics import accuracy

for package in ("typer", "rich", "safetensors", "yaml", "PIL", "matplotlib"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hdrq.calibrate.images import load_labelled  # noqa: E402
from hdrq.cli import app  # noqa: E402
from hdrq.methods.read_yaml import parse_yaml  # noqa: E402
from hdrq.qat.job import ImageDomain, Run  # noqa: E402

MODULE = """
import torch
from torch import nn

def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 2))
"""
RUN = """
model: qat_networks:tiny
data: {folder}/domains
out: {folder}/out
bits: W4A4
flatness: sagm
freeze: gaqat_a
rule: {{period: 2, tau: 0.5}}
epochs: 2
batch_size: 4
lr: 1e-2
resize: 16
crop: 16
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three domains of two classes, bright and dark pictures, and a run."""
    (tmp_path / "qat_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)
    for domain in ("art", "photo", "sketch"):
        for label, name in enumerate(("dark", "light")):
            where = tmp_path / "domains" / domain / name
            where.mkdir(parents=True)
            for k in range(6):
                pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(where / f"{k}.png")
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    return tmp_path


def run(*arguments, status=0):
    done = CliRunner().invoke(app, ["qat", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


def build():
    from qat_networks import tiny

    return tiny().eval()


def test_a_run_writes_models_tables_and_figures(folder):
    printed = run(folder / "run.yaml", "--set", "targets=[art, sketch]")
    assert "sagm steps, freezing gaqat_a, seed 0" in printed and "source*" in printed and "oracle" in printed
    with (folder / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], row["selection"]) for row in rows] == [
        (target, rule) for target in ("art", "sketch") for rule in ("source", "last", "oracle")
    ]
    for target in ("art", "sketch"):
        where = folder / "out" / target
        assert {"model.safetensors", "epochs.csv", "disorder.png"} <= {path.name for path in where.iterdir()}
        model = hdrq.load(where / "model.safetensors", build())
        images, labels = next(load_labelled(folder / "domains" / target, resize=16, crop=16))
        assert accuracy(model, images, labels) > 50
    models = [folder / "out" / target / "model.safetensors" for target in ("art", "sketch")]
    done = CliRunner().invoke(app, ["merge", *map(str, models), "-o", str(folder / "merged.safetensors")])
    assert done.exit_code == 0, done.output

    before = [path.read_bytes() for path in models]
    assert "workdir must hold no run" in run(folder / "run.yaml", status=2)
    run(folder / "run.yaml", "--resume", "--set", "targets=[art, sketch]")
    assert before == [path.read_bytes() for path in models]


def test_quantizers_start_from_the_float_run_of_the_same_target(folder):
    run(folder / "run.yaml", "--set", "bits=float", "--set", "freeze=", "--set", "rule={}", "--set", "targets=art",
        "--set", f"out={folder}/float")  # fmt: skip
    weights = f"weights={folder}/float/{{target}}/model.safetensors"
    run(folder / "run.yaml", "--set", weights, "--set", "targets=art", "--set", "epochs=1", "--set", "lr=0")
    trained, start = hdrq.load(folder / "out/art/model.safetensors", build()), build()
    assert not torch.equal(trained[0].weight, start[0].weight)
    assert isinstance(trained, nn.Sequential)


def test_a_domain_reads_what_an_evaluation_reads(folder, monkeypatch):
    preparation = (16, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    domain = ImageDomain(folder / "domains/art", ["dark", "light"], *preparation)
    images, labels = next(
        load_labelled(folder / "domains/art", resize=16, crop=16, mean=preparation[2], std=preparation[3])
    )
    assert torch.equal(domain.batch(range(12))[0], images) and torch.equal(domain.labels, labels)
    monkeypatch.setattr("hdrq.qat.job.KEPT", 0)
    unkept = ImageDomain(folder / "domains/art", ["dark", "light"], *preparation)
    assert unkept._kept is None and torch.equal(unkept.batch([3, 1])[0], images[[3, 1]])
    assert torch.equal(domain[5][0], images[5]) and len(domain) == 12
    other = ImageDomain(folder / "domains/art", ["light", "dark"], *preparation)
    assert domain.fingerprint == unkept.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("freezer=1", "setting must be one of"),
        ("model=", "model must be given, got none"),
        ("data=nowhere", "data must be a folder with a folder for each domain, got nowhere"),
        ("targets=[oil]", "target must be one of 'art', 'photo', 'sketch', got 'oil'"),
        ("rule=3", "rule must be a mapping from names, got 3"),
        ("rule={period: 1}", "period must be in"),
        ("flatness=", "flatness must be"),
        ("epochs=two", "epochs must be an int, got str"),
    ],
)
def test_refused_settings(folder, change, message):
    assert message in run(folder / "run.yaml", "--set", change, status=2)
    assert not (folder / "out").exists()


def test_refused_folders(folder):
    one = Run.of({"model": "m:f", "data": {"art": str(folder / "domains/art")}, "out": "out", "lr": parse_yaml("1e-3")})
    assert one.training.lr == 1e-3
    assert "domains must be two or more" in run(
        folder / "run.yaml", "--set", f"data={{art: {folder}/domains/art}}", status=2
    )
    (folder / "domains/art/new").mkdir()
    (folder / "domains/art/dark/0.png").rename(folder / "domains/art/new/0.png")
    with pytest.raises(ValueError, match="data must have the same classes in every domain, got 'new' in"):
        ImageDomain(folder / "domains/art", ["dark", "light"], 16, 16, (0,) * 3, (1,) * 3)
