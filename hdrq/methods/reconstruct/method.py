"""Reconstruction as a method of the sequential walk: BRECQ, QDrop and HDRQ, as their recipe says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from hdrq.calibrate.sequential import PARTS, Fitted, Journal, Unit
from hdrq.errors import DivergenceError
from hdrq.methods.loss import reported_samples
from hdrq.methods.reconstruct.learner import Learner
from hdrq.recipes import Recipe


@dataclass(frozen=True)
class Reconstruction:
    """Learn what the recipe learns so that a unit returns what it returned in full precision.

    Args:
        source_weights: the source's weight for each layer, by name; empty where no distance is asked for.
        seed: of batches, noise and drops.
        graph: whether a step is captured as a CUDA graph: ``"auto"`` (where that works), True or False.
    """

    recipe: Recipe
    source_weights: Mapping[str, torch.Tensor]
    seed: int
    graph: bool | str = "auto"

    @property
    def fits(self) -> tuple[str, ...]:
        """What is learned of a unit: its weights, its activations, or both."""
        if self.recipe.learns == "activations":
            return ("activations",)
        if self.recipe.activation_walk:
            return ("weights",)
        return (*PARTS, "outputs") if self.recipe.learn_outputs else PARTS

    def fit(self, unit: Unit, journal: Journal) -> Fitted:
        """Learn a unit, from where an earlier run stopped if there was one, and leave it in its best state.

        The best has the lowest ``reconstruction loss + λ Σ ‖W − W_src‖₂`` on samples of which nothing was learned. If
        that is the state before the first step, the unit is rounded to nearest, and a warning says so.

        Raises:
            DivergenceError: a loss is not finite; the unit is left as it last was good.
            ValueError: no weight of the unit has a gradient of the reconstruction loss.
        """
        learner, reported = self._learner(unit), reported_samples(unit.count)
        if (kept := journal.kept(unit)) is not None:
            tensors, start, before = kept
            learner.load(tensors, start)
        else:
            start, before = 0, learner.rounded_loss(reported)
            learner.judge(0)

        def save(iteration: int) -> None:
            journal.keep(unit, learner.state(), iteration, before)

        log = partial(self._note, journal, unit)
        try:
            learner.learn(start, log, save, journal.every)
        except DivergenceError as error:
            save(error.good)
            learner.parameters.finish()
            raise
        best = learner.best
        if best.iteration == 0:
            warnings.warn(
                f"block {unit.name or 'model'} is rounded to nearest: learning did not lower its loss of "
                f"{best.loss:.4g} on the samples that judge it; lower rates or more calibration samples may help",
                stacklevel=2,
            )
        learner.parameters.load(best.tensors)
        after = learner.rounded_loss(reported)
        learner.parameters.finish()
        return Fitted(best.tensors, {"loss_before": before, "loss_after": after})

    def restore(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Leave a unit as learning left it, its random streams too."""
        learner = self._learner(unit)
        learner.load(tensors, self.recipe.iterations)
        learner.parameters.finish()

    def _learner(self, unit: Unit) -> Learner:
        device = unit.target.device
        source = {
            layer.name: self.source_weights[layer.name].to(device, torch.float32)
            for layer in unit.layers
            if self.source_weights
        }
        return Learner(unit, self.recipe, source, self.seed, self.graph)

    def _note(self, journal: Journal, unit: Unit, iteration: int, loss: float) -> None:
        journal.note(unit, iteration, self.recipe.iterations, loss)
