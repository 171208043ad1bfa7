"""A step of a loop as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

WARM = 3  # steps that run as they are, while libraries choose algorithms and allocate: a capture must see neither


class Graph:
    """A function of tensors of fixed shapes, captured after its first calls and replayed from then on in one launch.

    The function must work in place on tensors that outlive it, and must not wait for the device. Where it cannot be
    captured it goes on as it is, and a warning says why; with ``must`` that is an error.

    Args:
        device: where the tensors are. It is made the current device, and its stream the current one: what is queued
            elsewhere no graph records.

    Raises:
        RuntimeError: the capture has recorded nothing.
    """

    def __init__(self, step: Callable, must: bool, device: torch.device) -> None:
        self.step, self.must, self.device = step, must, device
        self.calls, self.possible = 0, True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(device)

    def __call__(self, inputs: list[torch.Tensor]):
        with torch.cuda.device(self.device):
            if self.graph is None and self.possible and self.calls >= WARM:
                self._capture(inputs)
            if self.graph is None:
                self.calls += 1
                return self._eager(inputs)
            for own, new in zip(self.inputs, inputs, strict=True):
                own.copy_(new)
            self.graph.replay()
            return self.result

    def _eager(self, inputs: list[torch.Tensor]):
        """On a stream of its own, as the capture will be: gradients accumulate on the stream that made them."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step(inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self, inputs: list[torch.Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # Another thread gathers the next batch. PyTorch's own stream for captures is of the first device used.
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.result = self.step(self.inputs)
        except RuntimeError as error:
            if self.must:
                raise
            self.possible = False
            warnings.warn(f"the step runs without a CUDA graph: {error}", stacklevel=2)
            return
        if any("graph is empty" in str(warning.message).lower() for warning in said):
            raise RuntimeError(
                f"a CUDA graph of the step on {self.device} must hold its kernels, got none; graph=False"
            )
        for warning in said:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        self.graph = graph
