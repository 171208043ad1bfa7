"""Any classifier that ends in a linear layer, as training and SHOT want it: with ``features`` and a ``head``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PART = 64  # images at a time, where features of many are asked for


class Classifier(nn.Module):
    """A network and the name of its last layer, which makes logits (N, classes) of features (N, F).

    Args:
        network: a classifier; what it returns is what ``head`` returns.
        head: the name of a linear layer of it.
    """

    def __init__(self, network: nn.Module, head: str) -> None:
        super().__init__()
        self.network, self.head_name = network, head

    @property
    def head(self) -> Any:
        return self.network.get_submodule(self.head_name)

    def features(self, images: Any) -> Tensor:
        """What the head reads, (N, F), of images that are a tensor or :class:`hdrq.reproduce.folders.Pictures`."""
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            for part in images.split(PART):
                self.network(part)
        finally:
            hook.remove()
        return torch.cat(found)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def last_linear(network: nn.Module) -> str:
    """The name of the linear layer that was registered last.

    Raises:
        ValueError: there is none.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"model must end in a linear layer, got none in {type(network).__name__}")
    return names[-1]
