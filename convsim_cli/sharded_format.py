"""Checkpoints in several safetensors files and an index of them, as Hugging Face writes large ones.

Only the shards that hold a changed tensor are written anew, a tensor at a time, and all of them are on disk before the
first one takes its place. Each file is replaced whole; a process killed between two of those renames, which follow each
other at once, leaves some shards new and some old, with every old one still there as SHARD.bak.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from shutil import copyfileobj

from torch import Tensor

from convsim_cli.atomic import Replacement
from convsim_cli.checkpoint import INDEX, Changes, Checkpoint
from convsim_cli.errors import CheckpointError, InputError
from convsim_cli.safetensors_format import SafetensorsCheckpoint, natural_order


class ShardedCheckpoint(Checkpoint):
    """An index, `{"weight_map": {tensor: shard}}`, and its shards in the same folder.

    Raises CheckpointError for an index that is damaged, points out of its folder, or does not fit its shards.
    """

    def __init__(self, path: Path) -> None:
        self._shard_of = _read_index(path)
        self._shards = {name: _open_shard(path, name) for name in sorted(set(self._shard_of.values()))}
        for name, shard in self._shard_of.items():
            if name not in self._shards[shard].tensors:
                raise CheckpointError(
                    f"{path}: says that {name} is in {shard}, which does not hold it; fetch both again"
                )
        tensors = {
            name: self._shards[self._shard_of[name]].tensors[name] for name in sorted(self._shard_of, key=natural_order)
        }
        super().__init__(path, tensors)

    def load(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]].load(name)

    def target(self, output: Path) -> Path:
        """Return the index to write for a folder, which is made if need be, or for an index in one."""
        if output.name.endswith(INDEX):
            return super().target(output)
        if output.is_file() or output.suffix:
            raise InputError(f"{output}: the checkpoint is in shards; name a folder to write them to")
        if not output.parent.is_dir():
            raise InputError(f"{output}: there is no folder {output.parent}; make it first")
        return output / self.path.name

    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        """Write the shards that change beside `target`, the index; to another folder all of them.

        backup: each replaced file is kept as FILE.bak, the index under this very name.
        """
        target.parent.mkdir(exist_ok=True)
        in_place = target.exists() and target.samefile(self.path)
        with ExitStack() as stack:
            made: dict[Path, Replacement] = {}
            put: dict[Path, Callable[[str, Tensor], None]] = {}
            for name, tensor in changes:
                shard = self._shards[self._shard_of[name]]
                place = target.parent / shard.path.name
                if place not in made:
                    made[place] = stack.enter_context(Replacement(place))
                    with made[place].writing() as file:
                        put[place] = shard.copy_to(file, record)
                with made[place].writing():
                    put[place](name, tensor)
            places = {target.parent / shard.path.name: shard.path for shard in self._shards.values() if not in_place}
            for place, former in {**places, target: self.path}.items():
                if place not in made:
                    made[place] = stack.enter_context(Replacement(place))
                    with made[place].writing() as file, former.open("rb") as source:
                        copyfileobj(source, file)
            for replacement in made.values():
                replacement.flush()
            for place, replacement in made.items():
                replacement.commit(place.with_name(place.name + ".bak") if backup else None)


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable index of shards ({error}); fetch it again") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path}: expected an index with a weight_map of tensor names to shards; fetch it again")
    for shard in shards.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names the shard {shard!r}; expected a .safetensors file in the same folder")
    return shards


def _open_shard(index: Path, name: str) -> SafetensorsCheckpoint:
    path = index.with_name(name)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, but {index.name} names it; fetch the missing shard")
    return SafetensorsCheckpoint(path)
