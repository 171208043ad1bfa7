"""Train the demo's four networks: `python -m hdrq.demo.train [--out DIR]`.

The source network learns rendered digits with labels. A copy of it then adapts to each target domain without labels and
without the source data, as SHOT does (Liang et al. 2020, "Do we really need to access the source data?").
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hdrq.checkpoint.library import save_file
from hdrq.demo.data import SOURCE, TARGETS, load
from hdrq.demo.model import WEIGHTS, resnet
from hdrq.evaluate.averaging import average
from hdrq.evaluate.metrics import Row, accuracy
from hdrq.methods.post_training import fold
from hdrq.report.tables import table

BATCH = 64


def batches(count: int) -> list[Tensor]:
    """Indices 0..count-1 in random order, in batches of equal size; the rest is left out."""
    return list(torch.randperm(count).split(BATCH))[: count // BATCH]


def train_source(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int = 8,
    rate: float = 2e-3,
    wrap: Callable[[torch.optim.Optimizer, nn.Module], Any] | None = None,
) -> nn.Module:
    """Supervised training with label smoothing 0.1, which SHOT asks of its source model. The model is changed.

    ``wrap`` makes of Adam and the model what steps in its place.
    """
    model.train()
    steps = epochs * (len(images) // BATCH)
    adam = torch.optim.Adam(model.parameters(), rate)
    optimizer = adam if wrap is None else wrap(adam, model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps)
    for _ in range(epochs):
        for index in batches(len(images)):

            def loss(index: Tensor = index) -> Tensor:
                adam.zero_grad()
                value = F.cross_entropy(model(images[index]), labels[index], label_smoothing=0.1)
                value.backward()
                return value

            optimizer.step(loss)
            schedule.step()
    return model.eval()


def information_maximization(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions less the entropy of their mean: SHOT Eq. 3; certain and diverse is low."""
    p = logits.softmax(1)
    mean = p.mean(0)
    return -(p * logits.log_softmax(1)).sum(1).mean() + (mean * mean.log()).sum()


@torch.no_grad()
def pseudo_labels(model: Any, images: Tensor) -> Tensor:
    """Class (N,) of the nearest centroid, in cosine distance: SHOT Eqs. 4 to 6.

    The centroids are means of the features, first weighted by the predicted probabilities, then by the labels these
    centroids gave.
    """
    model.eval()
    features = model.features(images)
    weights = model.head(features).softmax(1)
    features = F.normalize(features)
    for _ in range(2):
        centroids = F.normalize(weights.T @ features)
        labels = (features @ centroids.T).argmax(1)
        weights = F.one_hot(labels, weights.shape[1]).float()
    return labels


def adapt(
    source: Any,
    images: Tensor,
    epochs: int = 30,
    rate: float = 1e-3,
    beta: float = 0.3,
    wrap: Callable[[torch.optim.Optimizer, nn.Module], Any] | None = None,
) -> Any:
    """SHOT: the head is frozen, the rest minimises information maximization + beta * cross-entropy to pseudo-labels.

    ``source`` has ``features`` (N, F) and a linear ``head``, and is left as it is. ``wrap`` is that of
    :func:`train_source`.
    """
    model = copy.deepcopy(source)
    model.head.requires_grad_(False)
    steps = epochs * (len(images) // BATCH)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    optimizer = adam if wrap is None else wrap(adam, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(epochs):
        labels = pseudo_labels(model, images)
        model.train()
        for index in batches(len(images)):

            def loss(index: Tensor = index, labels: Tensor = labels) -> Tensor:
                adam.zero_grad()
                logits = model(images[index])
                value = information_maximization(logits) + beta * F.cross_entropy(logits, labels[index])
                value.backward()
                return value

            optimizer.step(loss)
            schedule.step()
    return model.eval()


def report(source: nn.Module, adapted: dict[str, nn.Module]) -> Table:
    """Accuracy on the test splits of the source model, each adapted model, and the merge of the adapted ones."""
    tests = {domain: load(domain, "test") for domain in (SOURCE, *adapted)}
    merged = average([fold(model, tests[SOURCE][0][:32]) for model in adapted.values()])
    rows = [
        Row("source only", {domain: accuracy(source, *tests[domain]) for domain in adapted}),
        Row("adapted", {domain: accuracy(model, *tests[domain]) for domain, model in adapted.items()}),
        Row("merged", {domain: accuracy(merged, *tests[domain]) for domain in adapted}),
    ]
    return table(rows, f"Test accuracy (%), full precision; {SOURCE} {accuracy(source, *tests[SOURCE]):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the four safetensors files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    torch.set_num_threads(1)  # one order of summation: the same weights at every run
    source = train_source(resnet(), *load(SOURCE, "train"))
    adapted = {domain: adapt(source, load(domain, "train")[0]) for domain in TARGETS}
    for name, model in {"source": source, **adapted}.items():
        save_file(model.state_dict(), out / f"{name}.safetensors")
    Console().print(report(source, adapted))


if __name__ == "__main__":
    main()
