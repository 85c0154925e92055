"""State dicts in memory, and their way to a new file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.checkpoint import SUFFIXES, Changes, Checkpoint, tensor_infos
from convsim_cli.checkpoints.pickle_format import write_pickle
from convsim_cli.checkpoints.safetensors_format import write_safetensors


class StateDict(Checkpoint):
    """A state dict that has no file yet. path: what to call it."""

    def __init__(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)
        super().__init__(path, tensor_infos(state))

    def load(self, name: str) -> Tensor:
        return self._state[name]

    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        def write(file: BinaryIO) -> None:
            state = self._state | dict(changes)
            if target.suffix in SUFFIXES[1:]:
                write_pickle(file, state)
            else:
                write_safetensors(file, state, record)

        replace_file(target, write, backup)


def save_state_dict(state: Mapping[str, Tensor], target: Path, record: Mapping[str, str]) -> None:
    """Write a state dict to a file, atomically: safetensors, or a pickle where the name says .pt or its kin.

    record: metadata of a safetensors file. Raises WriteError.
    """
    StateDict(target, state).write(target, (), record)
