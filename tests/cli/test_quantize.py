"""``hdrq quantize``: from images on disk to a quantized file, by options, by YAML, and refused with a word why."""

import errno
import json
import os
import shutil
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hdrq
from hdrq.calibrate.images import MEAN, STD, load_data, load_labelled
from hdrq.evaluate.metrics import accuracy
from hdrq.methods.job import parse_setting, read_settings

for package in ("typer", "rich", "safetensors", "yaml", "PIL", "matplotlib"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402

MODULE = """
import torch
from torch import nn

def tiny(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 3)
    )

class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.b(self.a(self.norm(x)))

def blocks():
    layers = nn.Conv2d(3, 6, 16), nn.Flatten(), Block(nn.Identity()), Block(nn.LayerNorm(6))
    return nn.Sequential(*layers, nn.Linear(6, 3))

def number():
    return 3

def half():
    return tiny().bfloat16()

def missing():
    import nothing_of_this_name

def strict(width=4):
    assert width > 12, "twelve or more"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a module, images of two classes, and states of two models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tinynet.py").write_text(MODULE)
    draw = np.random.default_rng(0)
    for label in ("bike", "mug"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = draw.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    for name, seed in (("w", 0), ("s", 1)):
        save_file(model(seed).state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def model(seed=0, width=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, 6, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(54, 3)),
        ).eval()


OPTIONS = {
    "model": "tinynet:tiny",
    "weights": "w.safetensors",
    "source": "s.safetensors",
    "data": "images",
    "iterations": "4",
    "out": "q.safetensors",
}
SETTINGS = ("--set", "resize=20", "--set", "crop=16")


def call(*arguments, **options):
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return CliRunner().invoke(app, ["quantize", *map(str, arguments), *flags])


def manifest(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hdrq"])


def tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# --- data


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


# --- the command


def test_options_make_a_model(place):
    result = call(*SETTINGS, **OPTIONS)
    assert result.exit_code == 0, result.output
    for word in ("hdrq, W4A4, seed 0", "Accumulated error", "nearest", "loss", "output", "peak memory: host"):
        assert word in result.output
    quantized = hdrq.load(place / "q.safetensors", model())
    images = load_data(place / "images", resize=20, crop=16)
    learned_from = images[[i for i in range(20) if i % 10 != 9]]
    float_model, source = (model(seed) for seed in (0, 1))
    again = hdrq.quantize(float_model, learned_from, iterations=4, source=source)
    assert torch.equal(quantized(images), again(images))


def test_the_table_says_where_what_blocks_read_is_quantized(place):
    result = call(*SETTINGS, model="tinynet:blocks", data="images", recipe="rtn")
    assert result.exit_code == 0, result.output
    rows = {cells[0]: cells[1:] for line in result.stdout.splitlines() if (cells := line.replace("│", " ").split())}
    assert rows["2"][0] == "block" and rows["3"][0] == "layers"
    assert "input quantized at" in " ".join(result.stdout.replace("┃", " ").split())


def test_yaml_makes_the_same_model_and_options_override_it(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    settings = {**OPTIONS, "out": "y.safetensors", "iterations": 9, "resize": 20, "crop": 16, "weight-lr": "5e-2"}
    (place / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in settings.items()))
    result = call("run.yaml", iterations="4")
    assert result.exit_code == 0, result.output
    one, two = tensors("q.safetensors"), tensors("y.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_manifest_has_every_default(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    facts = manifest("q.safetensors")
    preparation = {"resize": 20, "crop": 16, "mean": list(MEAN), "std": list(STD)}
    assert facts["run"] == {**preparation, "preset": "paper", "samples": 1024, "held_out": 0.1, "device": "cpu"}
    assert facts["architecture"] == {"factory": "tinynet:tiny", "arguments": {}}
    assert facts["recipe"]["beta_start"] == 20 and facts["recipe"]["iterations"] == 4


def test_the_same_run_gives_the_same_file_wherever_it_lies(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    (place / "elsewhere").mkdir()
    shutil.copytree(place / "images", place / "elsewhere" / "images")
    others = {"data": "elsewhere/images", "out": "elsewhere/q.safetensors", "workdir": "elsewhere/work"}
    assert call("--resume", "--set", "cache=disk", *SETTINGS, **{**OPTIONS, **others}).exit_code == 0
    assert (place / "q.safetensors").read_bytes() == (place / "elsewhere" / "q.safetensors").read_bytes()
    assert b"elsewhere" not in (place / "elsewhere" / "q.safetensors").read_bytes()
    assert call("--set", "samples=8", *SETTINGS, **OPTIONS).exit_code == 0
    few, all_of_them = manifest("q.safetensors"), manifest("elsewhere/q.safetensors")
    assert few["fingerprints"]["calibration"] != all_of_them["fingerprints"]["calibration"]


def test_ablation_is_a_table(place):
    result = call("--ablate", *SETTINGS, **OPTIONS)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for word in ("nearest", "as given", "no distance", "nor noise"):
        assert word in text
    assert (place / "q.safetensors").exists()


def test_workdir_has_losses_and_resumes(place):
    options = {**OPTIONS, "workdir": "work"}
    assert call(*SETTINGS, **options).exit_code == 0
    assert {"losses.csv", "losses.png", "run.json", "block-000.safetensors"} <= {
        p.name for p in (place / "work").iterdir()
    }
    assert "workdir must hold no run" in call(*SETTINGS, **options).stderr
    before = tensors("q.safetensors")
    assert call("--resume", *SETTINGS, **options).exit_code == 0
    assert all(torch.equal(before[name], value) for name, value in tensors("q.safetensors").items())


@pytest.fixture
def full_disk(place, monkeypatch):
    """Nothing can be written below ``place / "full"``, which is known only once it is tried."""
    (place / "full").mkdir()
    opened = os.open

    def fails_there(path, *args, **options):
        if str(path).startswith(str(place / "full")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", fails_there)
    return {**OPTIONS, "out": "full/q.safetensors"}


def test_a_model_that_the_disk_has_no_room_for_is_kept_elsewhere(place, full_disk):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    result = call(*SETTINGS, **full_disk)
    blocks, message = result.stderr.splitlines()[:-1], result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and all(line.startswith("block ") for line in blocks)
    assert "full/q.safetensors must be written to a disk with room, got No space left on device" in message
    (kept,) = place.glob("q-*.safetensors")
    assert result.stderr.endswith(f"the quantized model is kept in {kept}\n")
    assert kept.read_bytes() == (place / "q.safetensors").read_bytes()


def test_a_model_is_kept_where_there_is_room_first(place, full_disk, monkeypatch):
    (place / "tmp").mkdir()
    monkeypatch.chdir(place / "full")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(place / "tmp"))
    above = {name: f"../{OPTIONS[name]}" for name in ("weights", "source", "data")}
    result = call(*SETTINGS, **{**OPTIONS, **above})
    assert result.exit_code == 2 and f"is kept in {place / 'tmp' / 'q-'}" in result.stderr
    hdrq.load(*(place / "tmp").iterdir(), model())


def test_a_full_disk_is_refused_before_anything_is_learned(place, monkeypatch):
    least = (3 * 4 * 9 + 4 * 6 * 9 + 54 * 3) // 4 + 4 * (4 + 6 + 3)
    for free, status in ((least, 0), (least - 1, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        result = call(*SETTINGS, **OPTIONS)
        assert result.exit_code == status, result.stderr
    message = (
        f"out must be on a disk with room for {least:,} bytes at least, got {least - 1:,} free for 'q.safetensors'"
    )
    assert message in result.stderr and "peak memory" not in result.stdout


def test_without_a_terminal_a_line_a_block(place):
    result = call(*SETTINGS, **OPTIONS)
    lines = [line for line in result.stderr.splitlines() if "loss" in line]
    assert [line.partition(":")[0] for line in lines] == ["block 1 of 3, 0", "block 2 of 3, 2", "block 3 of 3, 5"]
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    quiet = CliRunner().invoke(app, ["--quiet", "quantize", *SETTINGS, *flags])
    assert quiet.exit_code == 0 and "loss" not in quiet.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": None}, "model must be given, got none"),
        ({"data": None}, "data must be given, got none"),
        ({"model": "tinynet"}, "model must be written like \"module:factory\", got 'tinynet'"),
        ({"model": "nowhere:tiny"}, "model must be in a module that can be imported, got 'nowhere:tiny'"),
        ({"model": "tinynet:big"}, "model must name a function of tinynet, got 'big'"),
        ({"model": "tinynet:number"}, "model must be a factory of a torch.nn.Module, got one of int"),
        ({"data": "nowhere"}, "data must be a folder or a file, got nowhere"),
        ({"weights": "tinynet.py"}, "weights must be a safetensors file, a state dict or an index, got tinynet.py"),
        (
            {"weights": "other.safetensors"},
            "other.safetensors must have the tensors of tinynet:tiny, got 0.bias (5,), not (4,); 0.weight",
        ),
        ({"source": None}, "source must be the model before its adaptation"),
        ({"bits": "W1A4"}, "weight bits must be in [2, 16], got 1"),
        ({"recipe": "best"}, "recipe must be one of"),
        ({"out": "nowhere/q.safetensors"}, "out must be in a folder that exists, got 'nowhere/q.safetensors'"),
        ({"set": "tale=0.2"}, "setting must be one of"),
        ({"set": "tail"}, "set must be name=value, got 'tail'"),
        (
            {"model": "tinynet:missing"},
            "model must be made by tinynet:missing of {}, got ModuleNotFoundError: No module",
        ),
        ({"model": "tinynet:strict"}, "got AssertionError: twelve or more"),
        ({"model": "brokennet:tiny"}, "imported, got 'brokennet:tiny': SyntaxError: invalid syntax"),
        ({"model": "leavingnet:tiny"}, "imported, got 'leavingnet:tiny': SystemExit: 3"),
        ({"set": "model_args=5"}, "model_args must be a mapping from names, got 5"),
        ({"set": "model_args={depth: 3}"}, "got TypeError: tiny() got an unexpected keyword argument 'depth'"),
        ({"set": "mean=5"}, "mean and std must be 3 numbers each, std positive, got 5 and"),
        ({"set": "mean=[a, 1, 1]"}, "mean and std must be 3 numbers each, std positive, got ['a', 1, 1] and"),
        ({"set": "std=[.nan, 1, 1]"}, "mean and std must be 3 numbers each, std positive"),
        ({"set": "out=5"}, "out must be a string, got int"),
        ({"set": "resume=maybe"}, "resume must be true or false, got 'maybe'"),
        ({"set": "samples=0"}, "samples must be in [1, "),
        (
            {"data": "wide.npy"},
            "model must run on calibration, got RuntimeError from model((18, 16, 16, 3) float32): G",
        ),
        ({"weights": "code.pth"}, "got code.pth: it is damaged, or holds more than tensors, which is not read because"),
        ({"weights": "short.pth"}, "weights must be a safetensors file, a state dict or an index, got short.pth"),
        ({"workdir": "w.safetensors"}, "workdir must be a folder, or a new one in a folder, got 'w.safetensors'"),
        ({"data": "pipe"}, "data must be a folder or a file, got pipe, a device, a pipe or a socket"),
        ({"data": "text.npy"}, "data must be an array, got text.npy, which cannot be read"),
        ({"weights": "nested.pth"}, "got nested.pth: it must be a state dict of tensors, and holds epoch, model"),
        ({"set": "held_out=0.9"}, "held_out must be finite and in [0, 0.5], got 0.9"),
    ],
)
def test_bad_input_is_refused(place, options, message):
    save_file(model(width=5).state_dict(), place / "other.safetensors")
    (place / "brokennet.py").write_text("def tiny(:")
    (place / "leavingnet.py").write_text("raise SystemExit(3)")
    np.save(place / "wide.npy", np.zeros((20, 16, 16, 3), np.float32))
    torch.save(Code(), place / "code.pth")
    (place / "short.pth").write_bytes(b"tiny")
    np.save(place / "text.npy", np.array(["text"]))
    os.mkfifo(place / "pipe")
    torch.save({"epoch": 3, "model": model().state_dict()}, place / "nested.pth")
    result = call(*SETTINGS, **{name: value for name, value in {**OPTIONS, **options}.items() if value is not None})
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (place / "q.safetensors").exists() and not (place / "ran").exists()


class Code:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_a_model_in_half_precision_gets_data_in_half_precision(place):
    options = {"model": "tinynet:half", "data": "images", "recipe": "rtn", "out": "q.safetensors"}
    result = call(*SETTINGS, **options)
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(
        app, ["evaluate", "--model", "tinynet:half", "q.safetensors", "--data", "images", "--resize=20", "--crop=16"]
    )
    assert result.exit_code == 0, result.stderr


def test_settings_are_numbers_where_they_look_like_it(place):
    assert [parse_setting(t) for t in ("a=1e-3", "b=4", "c=uniform", "d=true", "e=")] == [
        *(("a", 1e-3), ("b", 4), ("c", "uniform"), ("d", True), ("e", None))
    ]
    (place / "list.yaml").write_text("- 1")
    (place / "no.yaml").write_text("a: [")
    (place / "deep.yaml").write_text("a: " + "[" * 100_000)
    for name, message in (
        ("list.yaml", "must be a mapping of settings, got list"),
        ("no.yaml", "config must be YAML"),
        ("deep.yaml", "config must be YAML, got deep.yaml: it must have at most 20 levels, got more"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings(name)


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", "--model", "tinynet:tiny", *arguments])


def test_evaluate_compares_files_on_folders(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    (place / "other").mkdir()
    for label in ("bike", "mug"):
        shutil.copytree(place / "images" / label, place / "other" / ("mug" if label == "bike" else "bike"))
    sizes = ["--resize", "20", "--crop", "16", "--batch-size", "3"]
    result = evaluate("w.safetensors", "q.safetensors", "--data", "images", "--data", "other", *sizes, "--json")
    assert result.exit_code == 0, result.output
    full, quantized = json.loads(result.stdout)
    images = load_data(place / "images", resize=20, crop=16)
    labels = torch.tensor([0] * 10 + [1] * 10)
    assert full["accuracies"]["images"] == accuracy(model(), images, labels)
    assert quantized["accuracies"]["images"] == accuracy(hdrq.load("q.safetensors", model()), images, labels)
    assert full["method"] == "w.safetensors" and quantized["method"] == "q.safetensors"
    never = int((model()(images).argmax(1) == 2).sum())  # of three classes, folders have two
    assert full["accuracies"]["images"] + full["accuracies"]["other"] == 100 - 5 * never
    table = evaluate("q.safetensors", "--data", "images", *sizes)
    assert table.exit_code == 0 and "harmonic mean" in table.stdout
    known = evaluate("w.safetensors", "q.safetensors", "--data", "images", "--json")  # as q was calibrated
    assert [row["accuracies"]["images"] for row in json.loads(known.stdout)] == [
        row["accuracies"]["images"] for row in (full, quantized)
    ]
    with pytest.warns(UserWarning, match=r"crop is 20, and q.safetensors was calibrated with 16"):
        evaluate("q.safetensors", "--data", "images", "--crop", "20")


def test_settings_are_saved_for_another_run(place):
    wanted = {**OPTIONS, "save-config": "all.yaml"}
    saved = call(*SETTINGS, "--set", "beta_start=19", **wanted)
    assert saved.exit_code == 0 and not (place / "q.safetensors").exists(), saved.output
    settings = read_settings(place / "all.yaml")
    assert (settings["resize"], settings["beta_start"], settings["weight_lr"]) == (20, 19.0, 0.05)
    assert call("all.yaml").exit_code == 0
    (place / "q.safetensors").rename(place / "first.safetensors")
    assert call(*SETTINGS, "--set", "beta_start=19", **OPTIONS).exit_code == 0
    one, two = tensors("first.safetensors"), tensors("q.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    wrong = call("--set", "beta_start=0", **wanted)
    assert wrong.exit_code == 2 and "beta_start must be finite and in" in wrong.stderr


def test_evaluate_takes_what_the_files_say_of_images_and_architecture(place):
    how = {**OPTIONS, "recipe": "rtn"}
    wide = "model_args={width: 8}"
    for out, mean in (("a", "[0, 0, 0]"), ("b", "[0, 0, 0]"), ("c", "[0.5, 0.5, 0.5]")):
        given = {name: value for name, value in how.items() if name not in ("weights", "source", "iterations")}
        made = [f"--set={wide}", f"--set=mean={mean}"]
        assert call(*SETTINGS, *made, **{**given, "out": f"{out}.safetensors"}).exit_code == 0
    assert CliRunner().invoke(app, ["merge", "a.safetensors", "b.safetensors", "-o", "m", "--force"]).exit_code == 0
    merged = evaluate("m", "--data", "images", "--json")
    assert merged.exit_code == 0, merged.output
    images = load_data(place / "images", resize=20, crop=16, mean=(0, 0, 0))
    network = hdrq.load("m", model_of(place, 8))
    assert json.loads(merged.stdout)[0]["accuracies"]["images"] == accuracy(
        network, images, torch.tensor([0] * 10 + [1] * 10)
    )
    both = evaluate("m", "c.safetensors", "--data", "images")
    assert both.exit_code == 2 and "mean must be given for files that were calibrated with others" in both.stderr
    narrow = evaluate("m", "--data", "images", "--model-args", "{width: 4}")
    assert narrow.exit_code == 2 and "codes of 0 must have the shape of the layer's weight" in narrow.stderr
    odd = evaluate("m", "--data", "images", "--model-args", "4")
    assert odd.exit_code == 2 and "model_args must be a mapping" in odd.stderr


def model_of(place, width):
    """The factory's network of another width."""
    names = {}
    exec((place / "tinynet.py").read_text(), names)
    return names["tiny"](width).eval()


def test_labels_are_those_of_the_first_folder(place):
    shutil.copytree(place / "images", place / "art")
    (place / "art" / ".cache").mkdir()
    shutil.copy(place / "images" / "mug" / "0.png", place / "art" / ".cache")
    shutil.copytree(place / "images" / "mug", place / "clipart" / "mug")
    shutil.copytree(place / "images" / "mug", place / "more" / "apple")
    batches = load_labelled(place / "art", resize=20, crop=16, batch_size=8)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 10 + [1] * 10
    sizes = ["--resize", "20", "--crop", "16"]
    result = evaluate("w.safetensors", "--data", "art", "--data", "clipart", *sizes, "--json")
    (row,) = json.loads(result.stdout)
    mugs = load_data(place / "clipart", resize=20, crop=16)
    assert row["accuracies"]["clipart"] == accuracy(model(), mugs, torch.ones(10, dtype=torch.int64))
    wrong = evaluate("w.safetensors", "--data", "art", "--data", "more", *sizes)
    assert wrong.exit_code == 2 and "got more/apple/0.png; classes: bike, mug" in wrong.stderr


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("tinynet.py", "images", "files must be safetensors, got tinynet.py"),
        ("nowhere", "images", "nowhere"),
        ("w.safetensors", "images", "w.safetensors must run on what resize and crop make of images, got mat1 and mat2"),
        ("w.safetensors", "nowhere", "data must be a folder with a folder for each class, got nowhere"),
        ("w.safetensors", "flat", "data must have every image in the folder of its class, got flat/0.png"),
    ],
)
def test_evaluate_refuses(place, file, data, message):
    (place / "flat").mkdir()
    shutil.copy(place / "images" / "mug" / "0.png", place / "flat")
    crop = "20" if data == "images" else "16"
    result = evaluate(file, "--data", data, "--resize", "20", "--crop", crop)
    assert result.exit_code == 2 and message in result.stderr
