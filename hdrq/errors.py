"""Errors that callers may want to catch."""

from __future__ import annotations

from torch import nn


class BackendError(RuntimeError):
    """The backend that was asked for is not available, or cannot run this op on this tensor."""


class MissingExtra(ImportError):
    """A package that only some uses need is not installed; the message has the extra of hdrq that brings it."""


class DivergenceError(FloatingPointError):
    """A loss is not finite. ``model`` has the finished blocks, and this one as it last was good."""

    def __init__(self, block: str, layer: str, iteration: int, loss: float, good: int) -> None:
        super().__init__(
            f"loss of block {block} must be finite, got {loss} at iteration {iteration}, first in layer {layer}; "
            f"the last good state, iteration {good}, is kept"
        )
        self.block, self.layer, self.iteration, self.good = block, layer, iteration, good
        self.model: nn.Module | None = None


class RankError(ConnectionError):
    """Another process of the group has failed, with the message that this one repeats, or is gone."""
