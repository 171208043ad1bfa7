"""A CUDA graph of a step, on a stand-in for ``torch.cuda`` that says which device and stream are current."""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hdrq.methods.reconstruct import graph
from hdrq.methods.reconstruct.graph import WARM, Graph

ELSEWHERE, HERE = "cuda:0", "cuda:1"


class Cuda(SimpleNamespace):
    """Two devices, of which the first is current. A graph records what runs on its own stream only."""

    def __init__(self, fails=False):
        super().__init__(events=[], fails=fails)
        self.current = self.Stream(ELSEWHERE)

    def Stream(self, device):
        made = SimpleNamespace(device=device)
        made.wait_stream = lambda other: self.note("wait", other.device)
        return made

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.note("replay"))

    def current_stream(self):
        return self.current

    def note(self, what, *more):
        self.events.append((what, self.current.device, *more))

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def device(self, device):
        return self.stream(self.Stream(device))

    @contextmanager
    def graph(self, made, stream, capture_error_mode):
        before = len(self.events)
        with self.stream(stream):
            yield
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
        if len(self.events) == before:
            warnings.warn("The CUDA Graph is empty. This usually means that", stacklevel=1)


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    monkeypatch.setattr(graph, "torch", SimpleNamespace(cuda=made, Tensor=torch.Tensor))
    return made


def run(step, steps=WARM + 2):
    for _ in range(steps):
        step([torch.zeros(2)])


def test_a_step_is_run_captured_and_replayed_on_the_models_device(cuda):
    step = Graph(lambda inputs: cuda.note("step"), True, HERE)
    run(step)
    eager = [("wait", HERE, HERE), ("step", HERE), ("wait", HERE, HERE)]
    assert cuda.events == [*eager * WARM, ("step", HERE), ("replay", HERE), ("replay", HERE)]
    assert cuda.current.device == ELSEWHERE


@pytest.mark.parametrize("must", [True, False])
def test_a_graph_that_has_recorded_nothing_is_refused(cuda, must):
    step = Graph(lambda inputs: None, must, HERE)
    with pytest.raises(RuntimeError, match="a CUDA graph of the step on cuda:1 must hold its kernels, got none"):
        run(step)


def test_a_step_that_cannot_be_captured_goes_on_with_a_word(cuda):
    cuda.fails = True
    with pytest.warns(UserWarning, match="the step runs without a CUDA graph: operation not permitted"):
        run(Graph(lambda inputs: cuda.note("step"), False, HERE))
    assert [event[0] for event in cuda.events].count("step") == WARM + 3  # the capture was one of them
    with pytest.raises(RuntimeError, match="operation not permitted"):
        run(Graph(lambda inputs: cuda.note("step"), True, HERE))


def test_warnings_of_a_capture_are_passed_on(cuda):
    def step(inputs):
        cuda.note("step")
        warnings.warn("slow", stacklevel=1)

    with pytest.warns(UserWarning, match="slow") as seen:
        run(Graph(step, True, HERE))
    assert len(seen) == WARM + 1
