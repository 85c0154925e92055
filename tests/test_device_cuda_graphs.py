"""What the CPU can show of CUDA graphs: torch's own torch.cuda.graph, on a stand-in for the driver with two devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from convsim_cli.device import WARM_UP, repeated
from convsim_cli.errors import ConvsimError

ITERATIONS = 20


class Stream:
    """A stream of the current device, or of a given one."""

    def __init__(self, device: Any = None) -> None:
        index = None if device is None else torch.device(device).index
        self.device_index = DRIVER.current if index is None else index
        self.device = torch.device("cuda", self.device_index)


class Driver:
    """Two devices, a current stream on each, and at most one stream that is being captured."""

    def start(self) -> None:
        self.current = 0
        self.streams = [Stream("cuda:0"), Stream("cuda:1")]
        self.graph: Graph | None = None
        self.fails_to_end = False
        self.mode = ""

    def launch(self, device: int, work: Callable[[], None]) -> None:
        """Put work on the current stream of a device, as an operation on its tensors does."""
        if self.graph is not None and self.graph.stream is self.streams[device]:
            self.graph.nodes.append(work)
        else:
            work()

    def exchange(self, device: int) -> int:
        former, self.current = self.current, device if device >= 0 else self.current
        return former

    def set_stream(self, stream: Stream) -> None:
        self.streams[stream.device_index] = stream
        self.current = stream.device_index


class Graph:
    def __init__(self) -> None:
        self.nodes: list[Callable[[], None]] = []

    def capture_begin(self, *, capture_error_mode: str, **_: Any) -> None:
        DRIVER.mode = capture_error_mode
        self.stream = DRIVER.streams[DRIVER.current]
        DRIVER.graph = self

    def capture_end(self) -> None:
        DRIVER.graph = None
        if DRIVER.fails_to_end:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nCompile with …")

    def replay(self) -> None:
        for node in self.nodes:
            node()


DRIVER = Driver()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    DRIVER.start()
    for name, stand_in in {
        "is_available": lambda: True,
        "current_device": lambda: DRIVER.current,
        "_exchange_device": DRIVER.exchange,
        "_maybe_exchange_device": DRIVER.exchange,
        "current_stream": lambda device=None: DRIVER.streams[
            DRIVER.current if device is None else torch.device(device).index
        ],
        "set_stream": DRIVER.set_stream,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Stream": Stream,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.delenv("CONVSIM_CUDA_GRAPHS", raising=False)
    yield DRIVER


class Counter:
    """A step of one operation on a device, which counts how often that really runs."""

    def __init__(self, device: int) -> None:
        self.device, self.runs, self.calls = device, 0, 0

    def __call__(self) -> None:
        self.calls += 1
        DRIVER.launch(self.device, self._run)

    def _run(self) -> None:
        self.runs += 1


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
def test_every_call_is_one_iteration_whichever_device_is_current(driver: Driver, device: int, current: int) -> None:
    driver.current = current
    streams = list(driver.streams)
    step = Counter(device)
    iterate = repeated(step, torch.device("cuda", device))
    for done in range(ITERATIONS):
        iterate()
        assert step.runs == done + 1
    assert step.calls == WARM_UP + 1  # the last one recorded, and replayed from then on
    assert (driver.current, driver.streams) == (current, streams)


def test_without_an_index_the_current_device_is_meant(driver: Driver) -> None:
    driver.current = 1
    step = Counter(1)
    iterate = repeated(step, torch.device("cuda"))
    for _ in range(ITERATIONS):
        iterate()
    assert (step.runs, step.calls) == (ITERATIONS, WARM_UP + 1)


def test_other_threads_may_allocate_memory_during_a_recording(driver: Driver) -> None:
    iterate = repeated(Counter(0), torch.device("cuda", 0))
    for _ in range(WARM_UP + 1):
        iterate()
    assert driver.mode == "thread_local"


def fail() -> None:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be …")


@pytest.mark.parametrize("while_ending", [False, True])
@pytest.mark.parametrize("device", [0, 1])
def test_a_failed_recording_is_one_line_and_leaves_no_stream(driver: Driver, device: int, while_ending: bool) -> None:
    streams = list(driver.streams)
    step = Counter(device)
    iterate = repeated(lambda: step() if driver.graph is None or while_ending else fail(), torch.device("cuda", device))
    for _ in range(WARM_UP):
        iterate()
    driver.fails_to_end = True
    with pytest.raises(ConvsimError, match=rf"^cuda:{device}: .*CUDA error.*CONVSIM_CUDA_GRAPHS=0") as caught:
        iterate()
    assert "\n" not in str(caught.value)
    assert ("not permitted" in str(caught.value)) != while_ending  # the first cause
    assert (driver.current, driver.streams, driver.graph) == (0, streams, None)
    assert step.runs == WARM_UP  # nothing went on without a graph


def test_elsewhere_and_where_it_is_switched_off_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Counter(0)
    assert repeated(step, torch.device("cpu")) is step
    monkeypatch.setenv("CONVSIM_CUDA_GRAPHS", "0")
    assert repeated(step, torch.device("cuda")) is step
