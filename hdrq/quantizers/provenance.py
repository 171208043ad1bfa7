"""How a quantized model was made: facts that stay with it and go into its file."""

from __future__ import annotations

from torch import nn


def origin(model: nn.Module) -> dict:
    """How a quantized model was made, as its checkpoint's manifest says it."""
    return model.__dict__.get("hdrq_origin", {})


def set_origin(model: nn.Module, facts: dict) -> None:
    """Say how a model was made."""
    model.__dict__["hdrq_origin"] = facts
