"""Reconstruction as a method of the sequential walk: BRECQ, QDrop and HDRQ, as their recipe says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from hdrq.calibrate.sequential import Fitted, Journal, Unit
from hdrq.errors import DivergenceError
from hdrq.methods.loss import measured_loss
from hdrq.methods.reconstruct.learner import Learner
from hdrq.methods.reconstruct.memory import kept_memory
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

    def fit(self, unit: Unit, journal: Journal) -> Fitted:
        """Learn a unit, from where an earlier run stopped if there was one.

        A unit whose objective, ``reconstruction loss + λ Σ ‖W − W_src‖₂``, is higher after learning than before is
        rounded to nearest instead, with a warning.

        Raises:
            DivergenceError: a loss is not finite; the unit is left as it last was good.
            ValueError: no weight of the unit has a gradient of the reconstruction loss.
        """
        weights = {layer.name: layer.latent.detach().clone() for layer in unit.layers}
        learner = self._learner(unit)
        begun = {name: tensor.detach().clone() for name, tensor in learner.parameters.by_name.items()}
        start, before, objective = 0, self._measure(unit), learner.distance_term()
        objective += before
        if (kept := journal.kept(unit)) is not None:
            tensors, start, before = kept
            learner.load(tensors, start)

        def save(iteration: int) -> None:
            journal.keep(unit, learner.parameters.state(), iteration, before)

        log = partial(self._note, journal, unit)
        try:
            learner.learn(start, log, save, journal.every)
        except DivergenceError as error:
            save(error.good)
            learner.parameters.finish()
            raise
        learned, distance = dict(learner.parameters.by_name), learner.distance_term()
        learner.parameters.finish()
        after = self._measure(unit)
        if not after + distance <= objective:
            warnings.warn(
                f"block {unit.name or 'model'} is rounded to nearest, since learning raised its loss from {before:.4g} "
                f"to {after:.4g}; lower rates or more calibration samples may help",
                stacklevel=2,
            )
            for layer in unit.layers:
                layer.latent.data = weights[layer.name]
            self.restore(unit, begun)
            learned, after = begun, before
        return Fitted(learned, {"loss_before": before, "loss_after": after})

    def restore(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Leave a unit as learning left it, its random streams too."""
        learner = self._learner(unit)
        learner.load(dict(tensors), self.recipe.iterations)
        learner.parameters.finish()

    def _learner(self, unit: Unit) -> Learner:
        source = {layer.name: self.source_weights[layer.name] for layer in unit.layers if self.source_weights}
        return Learner(unit, self.recipe, source, self.seed, self.graph)

    @kept_memory()
    def _measure(self, unit: Unit) -> float:
        return measured_loss(unit, self.recipe.batch_size)

    def _note(self, journal: Journal, unit: Unit, iteration: int, loss: float) -> None:
        journal.note(unit, iteration, self.recipe.iterations, loss)
