"""Checkpoints in several safetensors files and an index of them, as Hugging Face writes large ones.

Only the shards that hold a changed tensor are written anew, a tensor at a time, and all of them are on disk before the
first one takes its place. Where that is cut short, the next one to open the checkpoint puts the others in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import copyfileobj

from torch import Tensor

from convsim_cli.checkpoints.atomic import Replacements
from convsim_cli.checkpoints.checkpoint import INDEX, SUFFIXES, Changes, Checkpoint, end_saves
from convsim_cli.checkpoints.safetensors_format import SafetensorsCheckpoint, natural_order
from convsim_cli.errors import CheckpointError, InputError, WriteError


class ShardedCheckpoint(Checkpoint):
    """An index, `{"weight_map": {tensor: shard}}`, and its shards in the same folder.

    Raises CheckpointError for an index that is damaged, points out of its folder, or does not fit its shards.
    """

    def __init__(self, path: Path) -> None:
        self._shard_of = _read_index(path)
        self._shards = {
            name: SafetensorsCheckpoint(path.with_name(name)) for name in sorted(set(self._shard_of.values()))
        }
        for name, shard in self._shard_of.items():
            if name not in self._shards[shard].tensors:
                raise CheckpointError(
                    f"{path}: says that {name} is in {shard}, which does not hold it; fetch both again"
                )
        tensors = {
            name: self._shards[self._shard_of[name]].tensors[name] for name in sorted(self._shard_of, key=natural_order)
        }
        super().__init__(path, tensors)
        self.metadata = {key: text for shard in self._shards.values() for key, text in shard.metadata.items()}

    def load(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]].load(name)

    def target(self, output: Path) -> Path:
        """Return the index to write for a folder, which is made if need be, or for an index in one."""
        if output.name.endswith(INDEX):
            target = super().target(output)
        elif output.is_file() or (output.suffix in SUFFIXES and not output.is_dir()):
            raise InputError(f"{output}: the checkpoint is in shards; name a folder to write them to")
        elif not output.parent.is_dir():
            raise InputError(f"{output}: there is no folder {output.parent}; make it first")
        else:
            target = output / self.path.name
        self._is_in_place(target)
        return target

    def backup(self, target: Path) -> Path | None:
        """Return the pattern of the names under which the former shards are kept."""
        return target.with_name("*.safetensors.bak") if self._is_in_place(target) else None

    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        """Write the shards that change, where they are; with another index as `target`, all of them and it beside it.

        backup: wherever it is, each replaced shard is kept as SHARD.bak.
        """
        in_place = self._is_in_place(target)
        new_folder = not target.parent.exists()
        try:
            target.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"{target.parent}: cannot be made ({error.strerror or error})") from error
        try:
            self._write(target, changes, record, in_place, backup is not None)
        except BaseException:
            if new_folder:
                with suppress(OSError):
                    target.parent.rmdir()
            raise

    def _write(self, target: Path, changes: Changes, record: Mapping[str, str], in_place: bool, keep: bool) -> None:
        with Replacements() as files:
            put: dict[Path, Callable[[str, Tensor], None]] = {}
            for name, tensor in changes:
                shard = self._shards[self._shard_of[name]]
                place = target.with_name(shard.path.name)
                with files.writing(place) as file:
                    if place not in put:
                        put[place] = shard.copy_to(file, record)
                    put[place](name, tensor)
            for place, former in {} if in_place else self._sources(target).items():
                if place not in put:
                    with files.writing(place) as file, former.open("rb") as source:
                        copyfileobj(source, file)
            files.commit({place: place.with_name(place.name + ".bak") for place in put} if keep else {})

    def _sources(self, target: Path) -> dict[Path, Path]:
        """The files of a checkpoint with this index, and which of this one's each is made from."""
        shards = {target.with_name(shard.path.name): shard.path for shard in self._shards.values()}
        return {**shards, target: self.path}

    def _is_in_place(self, target: Path) -> bool:
        """Whether these are this checkpoint's own files. Raises InputError where only some of them are."""
        sources = self._sources(target).items()
        own = [place for place, former in sources if place.exists() and place.samefile(former)]
        if own and len(own) < len(sources):
            raise InputError(
                f"{target}: beside it, {own[0].name} is the checkpoint's own; name another folder, or no output at all "
                "to write the checkpoint back"
            )
        return bool(own)


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable index of shards ({error}); fetch it again") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path}: expected an index with a weight_map of tensor names to shards; fetch it again")
    for shard in set(shards.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names the shard {shard!r}; expected a .safetensors file in the same folder")
        try:
            end_saves(path.with_name(shard))
            found = path.with_name(shard).is_file()
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: names the shard {shard[:80]!r}, which no file can be called") from error
        if not found:
            raise CheckpointError(
                f"{path.with_name(shard)}: no such file, but {path.name} names it; fetch the missing shard"
            )
    return shards
