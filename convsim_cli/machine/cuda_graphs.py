"""An iteration that is always the same, recorded once on CUDA and replayed without work for the host in between."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from convsim_cli.errors import ConvsimError

WARM_UP = 3  # iterations before the recording: whatever is created once must exist by then
Step = Callable[[], None]


def repeated(step: Step, device: torch.device) -> Step:
    """Return a function that does one iteration per call: `step` itself, or on CUDA the replay of a graph of it.

    step: works on the same memory of `device` every time and never waits for the device. The first iterations run as
    they are. The recording raises ConvsimError where it fails; CONVSIM_CUDA_GRAPHS=0 in the environment does without.
    """
    if device.type != "cuda" or os.environ.get("CONVSIM_CUDA_GRAPHS") == "0":
        return step
    return _Graphed(step, device)


class _Graphed:
    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device, self._before = step, device, WARM_UP
        self._replay: Step | None = None

    def __call__(self) -> None:
        with torch.cuda.device(self._device):  # graphs and new streams belong to the current device
            if self._before > 0:
                self._before -= 1
                return self._step()
            if self._replay is None:
                self._replay = self._record()
            self._replay()

    def _record(self) -> Step:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        try:
            # torch.cuda.graph leaves its stream current if the capture cannot be ended: the outer context does not.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()  # recorded, not run
        except RuntimeError as error:
            reason = str(error.__context__ or error).partition("\n")[0]
            raise ConvsimError(
                f"{self._device}: an iteration could not be recorded as a CUDA graph ({reason}); "
                "set CONVSIM_CUDA_GRAPHS=0 to run without graphs"
            ) from error
        return graph.replay
