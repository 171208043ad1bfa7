"""``hdrq evaluate --label-maps``: mIoU of files on folders of images with label maps."""

import json

import numpy as np
import pytest
import torch
from torch import nn

for package in ("typer", "rich", "safetensors", "PIL"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import hdrq  # noqa: E402
from hdrq.calibrate.labelmaps import CLASSES, load_label_maps  # noqa: E402
from hdrq.cli import app  # noqa: E402
from hdrq.evaluate import class_iou, mean_iou  # noqa: E402

MODULE = "from torch import nn\ndef net(classes=19):\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), "
MODULE += "nn.Conv2d(8, classes, 1))\ndef many():\n    return net(21)\n"
IDS = (7, 8, 11, 23, 26, 0)
SIZE = ["--size", "8x10"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two cities' images and maps, of Cityscapes and plain; a state in full precision, and a quantized file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "segnet.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    names = {"leftImg8bit/val/a/{}_leftImg8bit.png": "gtFine/val/a/{}_gtFine_labelIds.png"}
    for folder, paths in (("city", names), ("mine", {"images/val/{}.png": "labels/val/{}.png"})):
        for k in range(5):
            labels = rng.integers(0, 6, (8, 10))
            values = np.array(IDS)[labels] if folder == "city" else labels
            for path, pixels in zip(*paths.items(), (rng.integers(0, 256, (8, 10, 3)), values), strict=True):
                file = tmp_path / folder / path.format(k)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 19, 1)).eval()
    save_file(model.state_dict(), "w.safetensors")
    images = next(iter(load_label_maps("city", "cityscapes", size=(8, 10), batch_size=5)))[0]
    hdrq.save(hdrq.quantize(model, images, "rtn", bits="W8A8"), "q.safetensors")
    return model


def evaluate(*arguments, model="segnet:net"):
    return CliRunner().invoke(app, ["evaluate", "--model", model, *arguments])


def test_rows_and_classes_are_what_python_measures(place):
    folders = ["--data", "city", "--label-maps", "cityscapes", "--data", "mine", "--label-maps", "plain"]
    result = evaluate("w.safetensors", "q.safetensors", *folders, *SIZE, "--batch-size", "2", "--json")
    assert result.exit_code == 0, result.output
    full, quantized = json.loads(result.stdout)
    for folder, layout in (("city", "cityscapes"), ("mine", "plain")):
        images, labels = next(iter(load_label_maps(folder, layout, size=(8, 10), batch_size=5)))
        assert full["accuracies"][folder] == pytest.approx(mean_iou(place, images, labels))
        names = CLASSES if folder == "city" else [*map(str, range(19))]
        ious = dict(zip(names, (100 * class_iou(place, images, labels)).tolist(), strict=True))
        there = {name: iou for name, iou in ious.items() if iou == iou}
        assert full["classes"][folder] == pytest.approx(there) and 5 <= len(there) < 19
    assert quantized["accuracies"] != full["accuracies"]
    table = evaluate("w.safetensors", "--data", "city", "--label-maps", "cityscapes", *SIZE)
    assert table.exit_code == 0 and "building" in table.stdout and f"{full['accuracies']['city']:.1f}" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        (["--data", "city"], "segnet:many", "model must tell the 19 classes of city apart, got 21 logits"),
        (["--data", "city", "--size", "8"], "segnet:net", "size must be height x width in pixels, like 512x1024"),
        (["--data", "city", "--size", "2x2"], "segnet:net", "w.safetensors must run on what size makes of images"),
        (["--data", "mine"], "segnet:net", "data must have the folder leftImg8bit/val of cityscapes, got mine without"),
        (
            ["--data", "city", "--label-maps", "idd"],
            "segnet:net",
            "label_maps must be one layout, or one for each of 1",
        ),
        (["--data", "city", "--split", "val"], "segnet:net", "split must be one of 'train', 'test', got 'val'"),
    ],
)
def test_refusals(place, arguments, model, message):
    if model == "segnet:many":
        save_file(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 21, 1)).state_dict(), "w.safetensors")
    sizes = [] if "--size" in arguments else SIZE
    result = evaluate("w.safetensors", "--label-maps", "cityscapes", *arguments, *sizes, model=model)
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")
