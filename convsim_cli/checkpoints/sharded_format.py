"""Checkpoints in several safetensors files with an index, as Hugging Face writes large ones.

Only shards with a changed tensor are written, one tensor at a time, and all of them are on disk before the first one
replaces its old file. If that is interrupted, the next command that writes the checkpoint completes it (`journal`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from convsim_cli.checkpoints.atomic import Replacements, free_names, refuse_interrupted
from convsim_cli.checkpoints.base import Changes, Checkpoint, check_parent
from convsim_cli.checkpoints.diagnose import Source, describe_unknown, is_index
from convsim_cli.checkpoints.safetensors_format import SafetensorsCheckpoint, copy_data, in_natural_order
from convsim_cli.errors import CheckpointError, InputError, WriteError, no_name_twice, some_of

_START = 4096  # bytes that tell what a file is
_LARGEST = 100_000_000  # bytes of an index, as of the header of a shard
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")  # unlike the .5 of a folder called v1.5


class ShardedCheckpoint(Checkpoint):
    """An index, `{"weight_map": {tensor: shard}}`, and its shards in the same folder.

    Raises CheckpointError for an index that is damaged, points out of its folder, or does not fit its shards.
    """

    def __init__(self, source: Source) -> None:
        path, self._source = source.path, source
        self._shard_of = read_index(source)
        for name in sorted(set(self._shard_of.values())):
            _require_shard(path, name)
        self._shards = {
            name: SafetensorsCheckpoint(path.with_name(name)) for name in sorted(set(self._shard_of.values()))
        }
        refuse_interrupted(path)  # waits for a save that began meanwhile, of which this has opened some files
        for opened in (source, *(shard.source for shard in self._shards.values())):
            opened.check_place()
        for name, shard in self._shard_of.items():
            if name not in self._shards[shard].tensors:
                raise CheckpointError(f"{path}: maps {name} to {shard}, which does not contain it; fetch both again")
        super().__init__(
            path, in_natural_order({name: self._shards[at].tensors[name] for name, at in self._shard_of.items()})
        )
        for name, file in self._shards.items():
            if unnamed := sorted(tensor for tensor in file.tensors if self._shard_of.get(tensor) != name):
                self.notes.append(
                    f"{path}: does not name these tensors of {name}: {some_of(unnamed)}; they are left out"
                )
        self.metadata = {key: text for shard in self._shards.values() for key, text in shard.metadata.items()}

    def load(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]].load(name)

    def target_for(self, output: Path) -> Path:
        """Return the index to write for a folder, which may not exist yet, or for an index in one."""
        if is_index(output):
            target = super().target_for(output)
        elif output.is_file() or (_FILE_SUFFIX.fullmatch(output.suffix) and not output.is_dir()):
            raise InputError(f"{output}: the checkpoint is sharded; choose a folder to write the shards to")
        else:
            check_parent(output)
            target = output / self.path.name
        self.is_in_place(target)
        return target

    def check_suffix(self, target: Path) -> None:
        """Accept any name of an index."""

    def is_in_place(self, target: Path) -> bool:
        """Return whether all files are this checkpoint's own. Raises InputError if only some of them are."""
        sources = self._sources(target).items()
        own = [place for place, source in sources if place.exists() and place.samefile(source.path)]
        if own and len(own) < len(sources):
            raise InputError(
                f"{target}: {own[0].name} beside it belongs to the checkpoint itself; choose another folder, or "
                "remove `output` to save in place"
            )
        return bool(own)

    def replaced_by(self, target: Path) -> list[Path]:
        """Return the shards, and elsewhere than in place the index, that exist beside the target."""
        places = [place for place in self._sources(target) if place != target or not self.is_in_place(target)]
        return [place for place in places if place.exists()]

    def backup_for(self, target: Path) -> Path:
        """Return the pattern of the names under which shards would be kept now."""
        return _pattern(free_names(self._backups(target))[0])

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        """Write the shards that change to the folder of the target; elsewhere also the others, and the index.

        backup: keep each replaced shard as SHARD.bak, or all of one save as SHARD.bak.1, … Returns the pattern of
        these names.
        """
        in_place = self.is_in_place(target)
        new_folder = not target.parent.exists()
        try:
            target.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"{target.parent}: cannot be created ({error.strerror or error})") from error
        try:
            return self._write(target, changes, record or {}, in_place, backup)
        except BaseException:
            if new_folder:
                with suppress(OSError):
                    target.parent.rmdir()
            raise

    def _write(
        self, target: Path, changes: Changes, record: Mapping[str, str], in_place: bool, backup: bool
    ) -> Path | None:
        with Replacements() as files:
            put: dict[Path, Callable[[str, Tensor], None]] = {}
            for name, tensor in changes:
                shard = self._shards[self._shard_of[name]]
                place = target.with_name(shard.path.name)
                with files.writing(place) as file:
                    if place not in put:
                        put[place] = shard.copy_to(file, record)
                    put[place](name, tensor)
            for place, source in {} if in_place else self._sources(target).items():
                if place not in put:
                    with files.writing(place) as file:
                        copy_data(source, 0, file)
            for place, source in self._sources(target).items() if in_place else ():
                if place not in put or not backup:  # a newer shard beside one that is written would mix two versions
                    source.check_place()
            replaced = [place for place in (put if in_place else self._sources(target)) if place.exists()]
            backups = {place: place.with_name(f"{place.name}.bak") for place in replaced} if backup else {}
            kept = files.commit(backups, self._backups(target))
        for shard in self._shards.values() if in_place else ():
            if target.with_name(shard.path.name) in put:
                shard.reopen()
        return _pattern(next(iter(kept.values()))) if kept else None

    def _backups(self, target: Path) -> list[Path]:
        """Return the names of every file's backup: one number belongs to one save, whichever files it changes."""
        return [place.with_name(f"{place.name}.bak") for place in self._sources(target)]

    def _sources(self, target: Path) -> dict[Path, Source]:
        """Return each file of a checkpoint with this index, and the open file of this one that it is made from."""
        shards = {target.with_name(shard.path.name): shard.source for shard in self._shards.values()}
        return {**shards, target: self._source}


def _pattern(backup: Path) -> Path:
    """Return the pattern of a shard's backup: *.safetensors.bak, with its number."""
    return backup.with_name(f"*.safetensors{backup.name[backup.name.rindex('.bak') :]}")


def read_index(source: Source) -> dict[str, str]:
    """Return the shard that holds each tensor, by name; a shard is a file in the index's folder, if it is there."""
    path = source.path
    with source.reading() as file:
        if source.size > _LARGEST:
            raise CheckpointError(f"{path}: an index of {source.size} bytes; expected at most {_LARGEST}")
        try:
            file.seek(0)
            index = json.loads(file.read(), object_pairs_hook=no_name_twice)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable index of shards ({error}); fetch it again") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path}: expected an index with a weight_map of tensor names to shards; fetch it again")
    for shard in set(shards.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names the shard {shard!r}; expected a .safetensors file in the same folder")
    return shards


def _require_shard(index: Path, name: str) -> None:
    place = index.with_name(name)
    try:
        found = place.is_file()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: names the shard {name[:80]!r}, which is not a valid file name") from error
    if not found:
        what, which = "no such file", "missing shard"
        if os.path.lexists(place):
            what = "not a regular file" if place.exists() else f"a broken link to {place.readlink()}"
            which = "shard"
        raise CheckpointError(f"{place}: {what}, but {index.name} names it; fetch the {which}")
    with Source(place).reading() as file:
        start = file.read(_START)
    if start[8:9] != b"{" and (what := describe_unknown(place, start) if start else "an empty file (fetch it again)"):
        raise CheckpointError(f"{place}: {what}, not a shard, as {index.name} says")
