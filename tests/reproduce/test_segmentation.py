"""The segmentation task: scenes with label maps, a U-Net, adaptation without labels, and rows of mIoU."""

import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hdrq.evaluate import mean_iou
from hdrq.prepare.units import find_blocks
from hdrq.reproduce import tasks
from hdrq.reproduce.jobs import Job, collected, run
from hdrq.reproduce.landscape import _batch_loss
from hdrq.reproduce.measures import decoded, score
from hdrq.reproduce.networks import networks
from hdrq.reproduce.render import render
from hdrq.reproduce.tasks import scenes, segmentation
from hdrq.reproduce.tasks.unet import UNet

pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")

DOMAINS = (scenes.SOURCE, *scenes.TARGETS)
FEW = 64


def narrow():
    return UNet((4, 6, 8, 8))


@pytest.fixture
def few(monkeypatch):
    """Fewer scenes."""
    monkeypatch.setattr(scenes, "_COUNT", {(domain, split): FEW for domain in DOMAINS for split in ("train", "test")})
    scenes.scenes.cache_clear()
    yield
    scenes.scenes.cache_clear()


@pytest.mark.parametrize("domain", DOMAINS)
def test_scenes(domain, few):
    images, labels = scenes.scenes(domain, "train")
    assert images.shape == (FEW, 3, 48, 48) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert labels.shape == (FEW, 48, 48) and labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) == {0, *scenes.DIGITS}
    scenes.scenes.cache_clear()
    assert torch.equal(scenes.scenes(domain, "train")[0], images)  # the same at every call
    assert not torch.equal(scenes.scenes(domain, "test")[0], images)
    # Colours change where labels do: the digits are there, and nowhere else.
    steps = (images[..., 1:] - images[..., :-1]).abs().mean(1)
    edges = labels[..., 1:] != labels[..., :-1]
    assert steps[edges].mean() > 1.4 * steps[~edges].mean()


def test_splits_share_no_digit_and_no_part_of_a_photograph():
    for domain in DOMAINS:
        train, test = (scenes._digits(domain, split)[0].flatten(1) for split in ("train", "test"))
        assert torch.cdist(train, test).min() > 0.1
    rng = np.random.default_rng(0)
    for name in ("temple", "flower", "portrait"):
        pixels = np.full((60, 200, 3), np.arange(200)[:, None], np.uint8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scenes, "_photograph", lambda name, pixels=pixels: pixels)
            columns = [255 * scenes._patches(name, scenes._COLUMNS[split], 300, rng) for split in ("train", "test")]
        assert columns[0].max() < columns[1].min()


def test_digits_have_their_classes():
    masks, labels = scenes._digits("fonts", "test")
    assert sorted(labels.unique().tolist()) == [*scenes.DIGITS] and len(masks) == 20
    ones, others = (masks[(labels == 1) == one].mean() for one in (True, False))
    assert ones < others  # the digit of the least ink


def test_unet_is_made_of_blocks():
    model = UNet().eval()
    assert 270_000 < sum(p.numel() for p in model.parameters()) < 290_000
    x = torch.randn(2, 3, 48, 48)
    assert model(x).shape == (2, 6, 48, 48) and model.features(x).shape == (2, 12, 24, 24)
    names = [f"{part}.{k}" for part, count in (("encoder", 4), ("decoder", 3)) for k in range(count)]
    assert find_blocks(model, lambda m: m(x)) == ["stem.0", *names, "head"]
    before = model(x)
    for k in range(4):  # each scale reaches the output by its skip
        changed = copy.deepcopy(model)
        changed.encoder[k].bn2.bias.data += 1
        assert not torch.allclose(changed(x), before)


def test_statistics_are_the_targets():
    torch.manual_seed(0)
    model, images = UNet(), torch.randn(200, 3, 48, 48) * 0.3 + 0.5
    momentum = model.stem[1].momentum
    assert segmentation.estimate_statistics(model, images) is model and not model.training
    read = model.stem[0](images)
    assert torch.allclose(model.stem[1].running_mean, read.mean((0, 2, 3)), atol=1e-5)
    assert (
        torch.allclose(model.stem[1].running_var, read.var((0, 2, 3)), rtol=0.05) and model.stem[1].momentum == momentum
    )


def test_pseudo_labels_are_balanced():
    """Logits of a class that is told with less certainty win pixels that are nearly its own."""
    told = torch.tensor([[6.0, 0], [6.0, 0], [6.0, 0], [0.0, 1.0], [0.0, 1.0], [0.1, 0.0]]).T.reshape(1, 2, 1, 6)
    assert told.argmax(1).flatten().tolist() == [0, 0, 0, 1, 1, 0]
    assert segmentation.pseudo_labels(nn.Identity(), told).flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_label_maps_move_with_their_images(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(segmentation, "CHANGE", 0.0)
    monkeypatch.setattr(segmentation, "NOISE", 0.0)
    labels = torch.randint(0, 6, (8, 12, 12), dtype=torch.uint8)
    images, moved = segmentation.varied(labels[:, None].float().expand(-1, 3, -1, -1), labels)
    assert torch.equal(images[:, 2], moved.float()) and not torch.equal(moved, labels)


def test_training_learns_label_maps():
    torch.manual_seed(0)
    areas = nn.functional.interpolate(torch.randn(128, 1, 2, 2), scale_factor=8.0)
    images, labels = areas + 0.1 * torch.randn(128, 3, 16, 16), (areas[:, 0] > 0).to(torch.uint8)
    model = segmentation.train_source(UNet((4, 6, 8, 8), 2), images, labels, 6, 2e-2)
    assert mean_iou(model, images, labels) > 70  # of one class alone, 25


def test_adaptation_keeps_the_head_and_the_source():
    torch.manual_seed(0)
    source = narrow().eval()
    before = copy.deepcopy(source.state_dict())
    adapted = segmentation.adapt(source, torch.randn(FEW, 3, 16, 16), 1, 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(adapted.head.weight, source.head.weight)
    assert not torch.equal(adapted.encoder[0].conv1.weight, source.encoder[0].conv1.weight)


def test_the_loss_is_of_labelled_pixels():
    logits, labels = torch.randn(2, 6, 4, 4), torch.randint(0, 6, (2, 4, 4), dtype=torch.uint8)
    labels[0] = 255
    expected = nn.functional.cross_entropy(logits[1:], labels[1:].long())
    assert torch.allclose(_batch_loss(nn.Identity(), (logits, labels)), expected)


def test_training_and_rows(few, tmp_path, monkeypatch):
    task = replace(
        segmentation.SEGMENTATION, name="small", targets=("fog", "night"), network=narrow, source_epochs=2, epochs=1
    )
    monkeypatch.setitem(tasks.TASKS, "small", task)
    models = networks(task, 0, tmp_path / "cache")
    plan = [Job("small", 0, "full precision", "float"), Job("small", 0, "RTN", "W4A4")]
    run(plan, tmp_path, tmp_path / "cache", choose=False)
    rows = list(csv.DictReader(collected(tmp_path).splitlines()))
    single = next(row for row in rows if row["method"] == "full precision" and row["domains"] == "fog")
    assert json.loads(single["accuracies"])["fog"] == pytest.approx(
        mean_iou(models["fog"], *task.load("fog", "test")), abs=0.05
    )
    for row in rows:
        for domain, text in json.loads(row["correct"]).items():
            values = decoded(text)
            assert values.shape == (FEW // 2, 2, 6)  # of two images each, since 50 groups are the most
            assert 100 * score(values) == pytest.approx(json.loads(row["accuracies"])[domain], abs=1e-3)
    (tmp_path / "rows.csv").write_text(collected(tmp_path))
    tables = render(tmp_path / "rows.csv", tmp_path / "tables")
    assert "Harmonic mean of mIoU (%), all targets" in tables and "accuracies" not in tables
