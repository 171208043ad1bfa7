"""``hdrq evaluate``: accuracies of files on folders, by what the files say and by options."""

import json
import shutil

import pytest
import torch
from cli.quantizing import OPTIONS, SETTINGS, call, model
from typer.testing import CliRunner

import hdrq
from hdrq.calibrate.images import load_data, load_labelled
from hdrq.cli import app
from hdrq.evaluate.metrics import accuracy


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
    options = ("--data", "images", "--offload-folder", "offload", "--json")
    known = evaluate("w.safetensors", "q.safetensors", *options)  # as q was calibrated
    assert [row["accuracies"]["images"] for row in json.loads(known.stdout)] == [
        row["accuracies"]["images"] for row in (full, quantized)
    ]
    with pytest.warns(UserWarning, match=r"crop is 20, and q.safetensors was calibrated with 16"):
        evaluate("q.safetensors", "--data", "images", "--crop", "20")


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


def test_files_of_one_name_are_told_apart(place):
    for folder in ("one", "two"):
        (place / folder).mkdir()
        shutil.copy("w.safetensors", folder)
    files = ["one/w.safetensors", "two/w.safetensors", "s.safetensors"]
    result = evaluate(*files, "--data", "images", "--resize", "20", "--crop", "16", "--json")
    assert [row["method"] for row in json.loads(result.stdout)] == files


def test_data_of_a_calibrated_merge_are_made_as_each_file_was_calibrated(place, monkeypatch):
    made = []
    monkeypatch.setattr(
        "hdrq.evaluate.files.load_data", lambda path, **how: made.append(how) or torch.zeros(9, 3, 16, 16)
    )
    for out, mean in (("a", "[0, 0, 0]"), ("b", "[0.5, 0.5, 0.5]")):
        given = {**OPTIONS, "recipe": "rtn", "iterations": "0", "out": f"{out}.safetensors"}
        assert call(*SETTINGS, f"--set=mean={mean}", **given).exit_code == 0
    line = ["merge", "a.safetensors", "b.safetensors", "--calibrate", "images", "--calibrate", "images", "-o", "m"]
    assert CliRunner().invoke(app, [*line, "--model", "tinynet:tiny"]).exit_code == 0
    assert [how["mean"] for how in made] == [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5)]
    assert {(how["resize"], how["crop"], how["limit"]) for how in made} == {(20, 16, 256)}


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
        (
            "w.safetensors",
            "nowhere",
            "to evaluate w.safetensors, data must be a folder with a folder for each class, got",
        ),
        ("w.safetensors", "flat", "data must have every image in the folder of its class, got flat/0.png"),
    ],
)
def test_evaluate_refuses(place, file, data, message):
    (place / "flat").mkdir()
    shutil.copy(place / "images" / "mug" / "0.png", place / "flat")
    crop = "20" if data == "images" else "16"
    result = evaluate(file, "--data", data, "--resize", "20", "--crop", crop)
    assert result.exit_code == 2 and message in result.stderr
