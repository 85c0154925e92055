"""An iteration that is always the same, recorded once on CUDA and replayed without the host in between."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

WARM_UP = 3  # iterations before the recording: what is made once must be there by then
Step = Callable[[], None]


def repeated(step: Step, device: torch.device) -> Step:
    """Return what does one more iteration at each call: `step` itself, or on CUDA a graph of it.

    step: works on the same memory every time and never waits for the device. The first iterations run as they are.
    Where a recording fails, all of them do; CONVSIM_CUDA_GRAPHS=0 is the switch that leaves it out.
    """
    if device.type != "cuda" or os.environ.get("CONVSIM_CUDA_GRAPHS") == "0":
        return step
    return _Graphed(step)


class _Graphed:
    def __init__(self, step: Step) -> None:
        self._step, self._before = step, WARM_UP
        self._replay: Step | None = None

    def __call__(self) -> None:
        if self._replay is not None:
            return self._replay()
        if self._before == 0:
            self._replay = self._record()
            return self._replay()
        self._before -= 1
        self._step()

    def _record(self) -> Step:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # recorded, not run
                self._step()
        except RuntimeError:
            return self._step
        return graph.replay
