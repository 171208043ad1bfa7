"""A task of a user's own folders and networks, from a file of settings to rows."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hdrq.checkpoint.architecture import build, factory
from hdrq.cli import app
from hdrq.reproduce import jobs, tasks
from hdrq.reproduce.classifier import Classifier, last_linear
from hdrq.reproduce.jobs import Job, collected, run
from hdrq.reproduce.tasks.given import Given, given

DOMAINS = ("source", "one", "two")
NETWORK = """
from torch import nn

def small(classes=3, width=12, last="head"):
    layers = {"conv": nn.Conv2d(3, width, 3, 2), "norm": nn.BatchNorm2d(width), "relu": nn.ReLU(),
              "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), last: nn.Linear(width, classes)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model

def after(classes=3):
    return nn.Sequential(small(classes), nn.ReLU())

def maps(classes=3):
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, classes, 1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three domains of three classes, each a colour with noise, and a module of networks."""
    path = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate("abc"):
            (path / "data" / domain / name).mkdir(parents=True)
            for k in range(84):
                colour = 90 + 20 * d + 70 * (np.arange(3) == c)
                pixels = np.clip(colour + rng.normal(0, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / "data" / domain / name / f"{k}.png")
    (path / "givennet.py").write_text(NETWORK)
    return path


SETTINGS = {
    "data": "data",
    "source": "source",
    "targets": ["one", "two"],
    "model": "givennet:small",
    "resize": 8,
    "crop": 8,
    "source_epochs": 6,
    "source_rate": 2e-2,
    "epochs": 1,
}


@pytest.fixture
def file(folder, tmp_path, monkeypatch):
    """Writes a file of settings, and forgets its task afterwards."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setattr(tasks, "_FILES", {})

    def write(name="shapes", **changes):
        settings = {**SETTINGS, "data": str(folder / "data"), **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return path

    return write


def rows_of(out):
    return list(csv.DictReader(collected(out).splitlines()))


def test_a_task_is_trained_and_run(file, tmp_path):
    task = tasks.task_of(str(file()))
    assert (task.name, task.source, task.targets) == ("shapes", "source", ("one", "two"))
    plan = [Job("shapes", 0, method, "W4A4", iterations=4) for method in ("RTN", "HDRQ, paper")]
    run(plan, tmp_path / "out", tmp_path / "cache", choose=False)
    rows = rows_of(tmp_path / "out")
    assert {(row["task"], row["method"]) for row in rows} == {("shapes", "RTN"), ("shapes", "HDRQ, paper")}
    assert min(float(row["harmonic_mean"]) for row in rows) > 70  # three classes: the network has learned
    assert len(list((tmp_path / "cache").glob("shapes-0-*.safetensors"))) == 1
    known = tasks.files()
    tasks.TASKS.clear()
    tasks._FILES.clear()
    tasks.remember(known)  # as another process does
    assert tasks.task_of("shapes").facts == task.facts


@pytest.fixture
def checkpoints(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    torch.manual_seed(0)
    for domain in DOMAINS:
        model = build("givennet:small")
        with torch.no_grad():
            model.head.weight.normal_()
        save_file(model.state_dict(), tmp_path / f"{domain}.safetensors")
    return {domain: f"{domain}.safetensors" for domain in DOMAINS}  # relative to the file of settings


TRAINING = {"source_epochs": None, "source_rate": None, "epochs": None}


def test_networks_that_are_given_are_not_trained(file, checkpoints, tmp_path, monkeypatch):
    path = file(checkpoints=checkpoints, **TRAINING)
    task = tasks.task_of(str(path))
    monkeypatch.setattr(task.training, "train_source", None)
    models = jobs.networks(task, 3, tmp_path / "cache")
    for domain in DOMAINS:
        want = load_file(tmp_path / f"{domain}.safetensors")["head.weight"]
        assert torch.equal(models[domain].head.weight, want) and not models[domain].training
    run([Job("shapes", 0, "full precision", "float")], tmp_path / "out", tmp_path / "cache", choose=False)
    rows = rows_of(tmp_path / "out")
    assert [row["domains"] for row in rows] == ["one", "two", "one+two"]
    images, labels = task.load("one", "test")
    with torch.no_grad():
        right = (models["one"](images[:]).argmax(1) == labels).double().mean().item()
    assert json.loads(rows[0]["accuracies"])["one"] == pytest.approx(100 * right, abs=1e-3)


STREETS = {**TRAINING, "layouts": {"one": "plain", "two": "plain"}, "resize": None, "crop": None, "size": [8, 12]}


@pytest.fixture
def streets(folder, tmp_path, monkeypatch):
    """Two domains of pictures whose pixels are of three colours, and networks of one layer that tell them apart."""
    monkeypatch.syspath_prepend(str(folder))
    rng = np.random.default_rng(0)
    for domain in ("one", "two"):
        for split, count in (("train", 200), ("val", 7)):
            for k in range(count):
                classes = rng.integers(0, 3, (4, 6)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
                pixels = 255 * (classes[..., None] == np.arange(3))
                for kind, array in (("images", pixels.astype(np.uint8)), ("labels", classes)):
                    path = tmp_path / "streets" / domain / kind / split / f"{k}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if kind == "images" or split == "val":  # targets have no labels to train on
                        Image.fromarray(array).save(path)
    model = build("givennet:maps")
    with torch.no_grad():
        first, last = model[0], model[2]
        for layer in (first, last):
            layer.weight.zero_(), layer.bias.zero_()
        for c in range(3):
            first.weight[c, c, 1, 1] = last.weight[c, c] = 1
    for domain in DOMAINS:
        save_file(model.state_dict(), tmp_path / f"{domain}.safetensors")
    return {"data": str(tmp_path / "streets"), "checkpoints": {d: f"{d}.safetensors" for d in DOMAINS}, **STREETS}


def test_label_maps(file, streets, tmp_path):
    task = tasks.task_of(str(file(model="givennet:maps", label_size=[4, 6], **streets)))
    images, labels = task.load("one", "test")
    assert images[:].shape == (7, 3, 8, 12) and labels[:].shape == (7, 4, 6)
    run([Job("shapes", 0, "full precision", "float")], tmp_path / "out", tmp_path / "cache", choose=False)
    rows = rows_of(tmp_path / "out")
    assert [row["domains"] for row in rows] == ["one", "two", "one+two"]
    assert all(float(row["harmonic_mean"]) == 100 for row in rows)
    with pytest.raises(ValueError, match=r"model must return \(N, classes, H, W\), .*, got \(1, 3\)"):
        given(file("flat", model="givennet:small", **{**streets, "checkpoints": saved(tmp_path)}))
    broken = images.files[3]
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"got {broken}, which cannot be read"):
        task.check(tmp_path / "other")


def saved(folder):
    save_file(build("givennet:small").state_dict(), folder / "small.safetensors")
    return dict.fromkeys(DOMAINS, "small.safetensors")


def test_rows_of_another_task_of_that_name_are_refused(file, tmp_path):
    plan = [Job("shapes", 0, "RTN", "W4A4")]
    tasks.task_of(str(file()))
    run(plan, tmp_path / "out", tmp_path / "cache", choose=False)
    given.cache_clear()
    tasks.task_of(str(file(crop=6)))
    with pytest.raises(ValueError, match=r"out must be a folder of runs with \{'facts': "):
        run([Job("shapes", 1, "RTN", "W4A4")], tmp_path / "out", tmp_path / "cache", choose=False)


def test_a_corrupt_image_is_named_before_anything_is_computed(file, folder, tmp_path, monkeypatch):
    task = tasks.task_of(str(file()))
    wrong = folder / "data" / task.load("two", "test")[0].files[5]
    before = wrong.read_bytes()
    wrong.write_bytes(before[: len(before) // 2])
    monkeypatch.setattr(jobs, "networks", None)
    plan = [Job("shapes", 0, "RTN", "W4A4")]
    try:
        with pytest.raises(ValueError, match=f"data must be images, got {wrong}, which cannot be read"):
            run(plan, tmp_path / "out", tmp_path / "cache", choose=False)
    finally:
        wrong.write_bytes(before)
    task.check(tmp_path / "cache")
    monkeypatch.setattr(type(task.load("two", "test")[0]), "__getitem__", None)
    task.check(tmp_path / "cache")  # once is enough


def test_training_may_begin_from_weights_of_other_classes(file, tmp_path):
    model = build("givennet:small", classes=10)
    save_file(model.state_dict(), tmp_path / "ten.safetensors")
    network = tasks.task_of(str(file(weights="ten.safetensors"))).network()
    assert isinstance(network, Classifier) and network.head_name == "head" and network.head.out_features == 3
    assert torch.equal(network.network.conv.weight, model.conv.weight)
    with pytest.raises(ValueError, match=r"ten.safetensors must have the tensors of givennet:small, got .*conv"):
        given(file("wide", weights="ten.safetensors", model_args={"width": 8}))


def test_features_are_what_the_head_reads(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    model = Classifier(build("givennet:small").eval(), "head")
    x = torch.randn(100, 3, 8, 8)
    features = model.features(x)
    assert features.shape == (100, 12)
    torch.testing.assert_close(model.head(features), model(x))
    assert not model.head._forward_pre_hooks and last_linear(model) == "network.head"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dta": "x"}, "setting must be one of 'data', .*, got 'dta'"),
        ({"model": None}, "model must be given, got none"),
        ({"targets": "one"}, "targets must be a list of two domains or more, got 'one'"),
        ({"targets": ["one"]}, "targets must be a list of two domains or more"),
        ({"targets": ["one", "source"]}, "source and targets must be different folders"),
        ({"targets": ["one", "../two"]}, "source and targets must be different folders without"),
        ({"source": 3}, "source must be a string, got 3"),
        ({"model_args": [3]}, r"model_args must be a mapping from names, got \[3\]"),
        ({"crop": 300}, r"crop must be in \[1, 8\]"),
        ({"mean": [0.5]}, "mean and std must be 3 numbers each"),
        ({"epochs": 0}, "epochs must be in"),
        ({"rate": "fast"}, "rate must be a number"),
        ({"test_share": 1}, "test_share must be finite and in"),
        ({"split_seed": -1}, "split_seed must be in"),
        ({"checkpoints": {"one": "a"}}, "checkpoints must be of every domain, source; one; two, got one"),
        ({"checkpoints": dict.fromkeys(DOMAINS, 1)}, "checkpoints must be paths"),
        ({"layouts": {"one": "plain"}}, "layout of two must be one of 'cityscapes', .*, got None"),
        ({"layouts": {"one": "plain", "two": "plain"}}, "checkpoints must be given with layouts"),
        ({"size": [8, 8]}, "size must be left out without layouts"),
        ({"checkpoints": dict.fromkeys(DOMAINS, "a")}, "source_epochs; source_rate; epochs must be left out"),
    ],
)
def test_settings_are_checked_before_anything_is_read(changes, message, file):
    path = file(**{"data": "nowhere", **changes})
    with pytest.raises((TypeError, ValueError), match=message):
        given(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "data must have a folder 'source', a domain, got .*nowhere with none"),
        ({"test_share": 0.5}, "data must have 200 training images of a domain at least, got 126 of source"),
        ({"model": "givennet:none"}, "model must name a function of givennet, got 'none'"),
        ({"model": "givennet:maps"}, "model must end in a linear layer, got none in Sequential"),
        ({"model": "givennet:after"}, "head must be the layer that makes the logits, got '0.head'"),
        ({"model_args": {"classes": 5}}, r"model must return \(N, 3\), a logit for each class of data, got \(1, 5\)"),
        ({"head": "conv"}, "head must be the name of a linear layer of givennet:small, got 'conv'"),
        ({"crop": 2}, r"model must run on images \(1, 3, 2, 2\), as data is prepared, got"),
        ({"weights": "gone.pth"}, "weights must be a file that exists, got .*gone.pth"),
        ({"checkpoints": dict.fromkeys(DOMAINS, "gone.pth"), **TRAINING}, "weights must be a file that exists"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(changes, message, file):
    with pytest.raises((FileNotFoundError, TypeError, ValueError), match=message):
        given(file(**changes))


def test_names_and_yaml(file, tmp_path):
    with pytest.raises(
        ValueError, match=r"a file of settings must have a name that no other task has, got .*digits.yaml"
    ):
        tasks.task_of(str(file("digits")))
    with pytest.raises(FileNotFoundError, match=r"config must be a file of settings, got .*absent.yaml"):
        tasks.task_of(str(tmp_path / "absent.yaml"))
    assert Given.of({**SETTINGS, "mean": [0, 0, 0]}).mean == (0.0, 0.0, 0.0)


def test_from_the_command_line(file, tmp_path, monkeypatch):
    short = [Job("shapes", 0, "RTN", "W3A3")]
    monkeypatch.setattr(jobs, "grid", lambda task, *given: short if task == "shapes" else 1 / 0)
    path = file()
    result = CliRunner().invoke(app, ["reproduce", "--quick", "--task", str(path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "## shapes" in result.output
    bad = CliRunner().invoke(app, ["reproduce", "--task", str(file("other", crop=0)), "-o", str(tmp_path / "no")])
    assert "crop must be in [1, 8], got 0" in bad.stderr


class Library:
    """As timm and torchvision are called, neither of which is here."""

    def __init__(self):
        self.models = self

    def is_model(self, name):
        return name == "net.v1"

    def create_model(self, name, **arguments):
        return name, arguments

    def list_models(self):
        return ["net"]

    def get_model_builder(self, name):
        return lambda **arguments: (name, arguments)


@pytest.mark.parametrize(("library", "name"), [("timm", "net.v1"), ("torchvision", "net")])
def test_models_of_libraries_by_name(library, name, monkeypatch):
    monkeypatch.setitem(sys.modules, library, Library())
    assert factory(f"{library}:{name}")(num_classes=3) == (name, {"num_classes": 3})
    with pytest.raises(ValueError, match=f"model must name a function of {library}, got 'other'"):
        factory(f"{library}:other")
