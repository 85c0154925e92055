"""What the CPU can show of CUDA graphs: with a graph that keeps the recorded step and does it again at each replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from convsim_cli.machine.cuda_graphs import WARM_UP, repeated

CUDA = torch.device("cuda")


class Counter:
    """A step that counts, and knows whether it is being recorded."""

    recording = False

    def __init__(self) -> None:
        self.runs = 0
        self.recorded = 0

    def __call__(self) -> None:
        if Counter.recording:
            self.recorded += 1
        else:
            self.runs += 1


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def record(_: Graph) -> Iterator[None]:
        Counter.recording = True
        try:
            yield
        finally:
            Counter.recording = False

    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)


@pytest.mark.usefixtures("graphs")
def test_every_call_is_one_iteration_run_or_replayed() -> None:
    step = Counter()
    once_more = repeated(step, CUDA)
    for _ in range(20):
        once_more()
    assert (step.runs, step.recorded, Graph.replays) == (WARM_UP, 1, 20 - WARM_UP)


@pytest.mark.usefixtures("graphs")
def test_a_recording_that_fails_leaves_the_step_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    step = Counter()
    once_more = repeated(lambda: refuse() if Counter.recording else step(), CUDA)
    for _ in range(20):
        once_more()
    assert (step.runs, Graph.replays) == (20, 0)


def test_elsewhere_and_where_it_is_switched_off_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Counter()
    assert repeated(step, torch.device("cpu")) is step
    monkeypatch.setenv("CONVSIM_CUDA_GRAPHS", "0")
    assert repeated(step, CUDA) is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_minimization_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from convsim_cli.kernels import Kernel
    from convsim_cli.minimize import Minimization, minimize_kernel

    kernel, weight = Kernel("a", (64, 64, 3, 3)), torch.randn(64, 64, 3, 3, device="cuda")
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("CONVSIM_CUDA_GRAPHS", switch)
        results.append(minimize_kernel(kernel, weight, Minimization(120, preserve_norm=True))[0])
    torch.testing.assert_close(*results)
