"""A state dict in memory as a checkpoint, and how it is written to a new file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.checkpoint import Changes, Checkpoint, tensor_infos
from convsim_cli.checkpoints.formats import format_for


class StateDict(Checkpoint):
    """A state dict that has no file yet. path: what to call it in messages."""

    def __init__(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)
        super().__init__(path, tensor_infos(state))

    def load(self, name: str) -> Tensor:
        return self._state[name]

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        write_new = format_for(target).write
        assert write_new  # `format_for` returns no other

        def write(file: BinaryIO) -> None:
            write_new(file, self._state | dict(changes), record or {})

        return replace_file(target, write, target.with_name(f"{target.name}.bak") if backup else None)

    def check_suffix(self, target: Path) -> None:
        format_for(target)


def save_state_dict(state: Mapping[str, Tensor], target: Path, record: Mapping[str, str]) -> None:
    """Write a state dict to a file, atomically, in the format that its suffix says.

    record: metadata of a safetensors file. Raises InputError for an unknown suffix, WriteError.
    """
    StateDict(target, state).write(target, (), record)
