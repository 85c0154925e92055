"""The checkpoint formats, in one table: how a file is opened, newly written, and kept from being overwritten.

Formats are told apart by the content of a file. A checkpoint may also be on the Hugging Face Hub, as
`hf://owner/repo[@revision][/file]`. Importing this module imports no torch: help texts are made from it.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

from convsim_cli.checkpoints.atomic import check_regular, replace_file, settle
from convsim_cli.checkpoints.base import Changes, Checkpoint, tensor_infos
from convsim_cli.checkpoints.diagnose import (
    PICKLES,
    SAFETENSORS,
    Source,
    checkpoint_in,
    describe_distributed,
    describe_unknown,
    explained,
    is_index,
    is_pickle,
)
from convsim_cli.errors import CheckpointError, ConvsimError, DownloadError, InputError, brief, one_of, to_install

if TYPE_CHECKING:
    from torch import Tensor

_START = 512  # bytes that tell what a file is
_DIGEST = r"(?<![0-9a-f])(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})(?![0-9a-f])"
_LINKED = re.compile(_DIGEST)
_NAMED = re.compile(rf"(?:[A-Za-z0-9]+[-:_](?:s\d+--)?)?(?!.{{32}}$){_DIGEST}")  # 32 digits alone may be a random name

HUB = "hf://"
HUB_FORM = f"{HUB}OWNER/REPO[@REVISION][/FILE]"
_HUB_NAME = re.compile(
    rf"{HUB}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>.*))?"
)
_HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # where no file is named
_LISTED = 6  # files in an error, at most


@dataclass(frozen=True)
class Format:
    """A checkpoint format: a new one is an entry in `FORMATS`, and a module that reads and writes it.

    name: what a file of it is called, with its article; suffixes: of its file names; recognizes: takes a path and the
    file's first bytes; open: takes the open file, and the key if the format has `keys`; write: takes a new file, a
    state dict and metadata, None for a format that can only be written back; keeps_record: whether a file of it has a
    place for the `convsim.*` record.
    """

    name: str
    suffixes: tuple[str, ...]
    recognizes: Callable[[Path, bytes], bool]
    open: Callable[..., Checkpoint]
    write: Callable[[BinaryIO, Mapping[str, Tensor], Mapping[str, str]], None] | None
    keys: bool = False
    keeps_record: bool = True


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """Return what calls a function of a format's module, imported on the first call: it imports torch."""
    return lambda *arguments: getattr(import_module(f"convsim_cli.checkpoints.{module}"), name)(*arguments)


FORMATS: tuple[Format, ...] = (
    Format(
        "an index of shards",
        (".index.json",),
        lambda path, _: is_index(path),
        _lazy("sharded_format", "ShardedCheckpoint"),
        None,
    ),
    Format(
        "a safetensors file",
        SAFETENSORS,
        lambda _, start: len(start) > 8 and start[8:9] == b"{",
        _lazy("safetensors_format", "SafetensorsCheckpoint"),
        _lazy("safetensors_format", "write_safetensors"),
    ),
    Format(
        "a pickle",
        PICKLES,
        lambda _, start: is_pickle(start),
        _lazy("pickle_format", "PickledCheckpoint"),
        _lazy("pickle_format", "write_state_dict"),
        keys=True,
        keeps_record=False,
    ),
)


def open_checkpoint(path: str | PathLike[str], key: str | None = None, *, for_writing: bool = False) -> Checkpoint:
    """Open a checkpoint: a file of any known format, a folder that holds one checkpoint, or `hf://owner/repo`.

    A checkpoint on the Hub is downloaded, into the cache of huggingface_hub, unless it is there. After the repository
    there may be `@revision`, and `/file`; without a file it is `model.safetensors`, the shards of its index, or
    `pytorch_model.bin`. Raises DownloadError if it cannot be fetched.

    key: which dictionary of tensors in a pickle to take, names joined by dots (`ema.state_dict`). for_writing: complete
    an interrupted save first; otherwise it is an error. Raises CheckpointError, in one line that says what was found
    and what to do, for anything that is not a checkpoint.
    """
    name = path_of("path", path)
    if is_on_hub(path):
        path, for_writing = _fetch(name), False
    path = Path(path)
    with explained(path):
        settle(path, for_writing)
        if path.is_dir():
            path = checkpoint_in(path, new_suffixes())
    source = Source(path)
    with source.reading() as file:
        start = file.read(_START)
    if not start:
        raise CheckpointError(f"{path}: an empty file; fetch it again")
    if path.suffix == ".distcp":
        raise CheckpointError(f"{path}: part of {describe_distributed(path.parent)}")
    for format_ in FORMATS:
        if format_.recognizes(path, start):
            break
    else:
        raise CheckpointError(f"{path}: {describe_unknown(path, start)}, not a checkpoint ({one_of(new_suffixes())})")
    if key is not None and not format_.keys:
        raise InputError(f"`key` applies only to pickled checkpoints; {path} is {format_.name}")
    checkpoint = format_.open(source, key) if format_.keys else format_.open(source)
    checkpoint.suffixes = format_.suffixes
    if is_on_hub(name):
        checkpoint.name = name
    return checkpoint


def path_of(name: str, value: object) -> str:
    """Return a path, given as the argument `name`, as a string; raise InputError for what is none."""
    if isinstance(value, str | PathLike):
        path = fspath(value)
        if isinstance(path, str) and path and "\0" not in path:
            return path
    raise InputError(f"`{name}` is {value!r}; expected a path")


def check_exists(path: str | Path, *, for_writing: bool = False) -> None:
    """Raise CheckpointError for a path on this machine to nothing; as `open_checkpoint`, without importing torch."""
    file = Path(path)
    with explained(file):
        if not is_on_hub(path) and not file.exists():
            settle(file, for_writing)
            file.stat()


def is_on_hub(path: object) -> bool:
    """Return whether a checkpoint is named as one on the Hugging Face Hub. A Path never is: it would lose a slash."""
    return isinstance(path, str) and path.startswith(HUB)


def _fetch(name: str) -> Path:
    """Return where the cache holds a checkpoint of the Hub, downloaded if need be; of an index, with its shards."""
    parts = _HUB_NAME.fullmatch(name)
    if not parts:
        raise InputError(f"{name}: expected {HUB_FORM}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    except ImportError as error:
        raise InputError(f"{name}: needs huggingface_hub, which is not installed: {to_install('hub')}") from error
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every attempt
    repo, candidates = parts["repo"], [parts["file"]] if parts["file"] else _HUB_FILES
    revision = unquote(parts["revision"]) if parts["revision"] else None
    wanted, missing = one_of(candidates), None
    try:
        for file in candidates:
            offline = isinstance(missing, LocalEntryNotFoundError)  # the others may be in the cache
            try:
                path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=offline))
                break
            except (LocalEntryNotFoundError, RemoteEntryNotFoundError) as error:
                missing = missing if offline else error
        else:
            assert missing
            raise missing
        if is_index(path):
            commit = path.parents[file.count("/")].name  # which all shards are of, even if the branch moves
            for shard in sorted(set(_lazy("sharded_format", "read_index")(Source(path)).values())):
                wanted = f"{file.rpartition('/')[0]}/{shard}".lstrip("/")
                hf_hub_download(repo, wanted, revision=commit)
    except ConvsimError:
        raise
    except Exception as error:  # whatever a library raises that cannot download
        raise _explain_hub(name, repo, revision, wanted, error) from error
    finally:
        log.setLevel(level)
    return path


def _explain_hub(name: str, repo: str, revision: str | None, wanted: str, error: Exception) -> ConvsimError:
    """Return in one line why files of a repository cannot be had, and what to do."""
    from huggingface_hub import errors, list_repo_files

    login = "log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name}: {brief(error)}")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name}: access to {repo} is restricted; ask for it on the repository's page, and {login}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{name}: no repository {repo}, or a private one; check the name, or {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name}: {repo} has no revision {revision}; use one of its branches, tags or commits")
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = brief(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        return DownloadError(f"{name}: not in the cache, and cannot be downloaded ({reason}); check the network")
    if not isinstance(error, errors.RemoteEntryNotFoundError):
        return DownloadError(f"{name}: cannot be downloaded ({brief(error)}); try again")
    try:
        files = list_repo_files(repo, revision=revision)
    except Exception as problem:
        return InputError(f"{name}: {repo} has no {wanted}, and its files cannot be listed ({brief(problem)})")
    found = [file for file in files if file.lower().endswith(tuple(new_suffixes())) or is_index(Path(file))]
    names = ", ".join(found[:_LISTED]) + (", …" if len(found) > _LISTED else "")
    has = f"it has {names}; choose one of them: {HUB}{repo}/FILE" if found else "it has no checkpoint"
    return InputError(f"{name}: {repo} has no {wanted}; {has}")


def format_for(target: Path) -> Format:
    """Return the format of a new file, by its suffix. Raises InputError for a suffix that no format has."""
    for format_ in FORMATS:
        if format_.write and target.name.lower().endswith(format_.suffixes):
            return format_
    what = f"unknown suffix {target.suffix}" if target.suffix else "has no suffix"
    raise InputError(f"{target}: {what}; name it {one_of(new_suffixes())}")


def new_suffixes() -> list[str]:
    """Return the suffixes that a new file may have."""
    return [suffix for format_ in FORMATS if format_.write for suffix in format_.suffixes]


class StateDict(Checkpoint):
    """A state dict that has no file yet. path: what to call it in messages.

    What modules keep beside tensors (`get_extra_state`) is written as it is, where the format can hold it.
    """

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        import torch

        self._state = dict(state)
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        self._beside = [name for name in state if name not in tensors]
        super().__init__(path, tensor_infos(tensors))

    def load(self, name: str) -> Tensor:
        found: Tensor = self._state[name]
        return found

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        write_new = format_for(target).write
        assert write_new  # `format_for` returns no other

        def write(file: BinaryIO) -> None:
            write_new(file, self._state | dict(changes), record or {})

        return replace_file(target, write, target.with_name(f"{target.name}.bak") if backup else None)

    def keeps_record(self, target: Path) -> bool:
        return format_for(target).keeps_record

    def check_suffix(self, target: Path) -> None:
        if self._beside and format_for(target).keeps_record:
            raise InputError(f"{target}: a safetensors file cannot hold {self._beside[0]}, which is no tensor; use .pt")
        format_for(target)


def check_replaceable(files: Iterable[Path], named: Path) -> None:
    """Raise InputError for a file that is read-only, no checkpoint, or that others share by a hard link or a store.

    named: the file or folder that the user named. A link beside it, such as a shard, must not lead out of its folder.
    A store such as a Hugging Face cache names files by digests of their content, and links to them. Mode bits decide
    what is read-only, since the superuser may write anywhere.
    """
    for file in files:
        check_regular(file)
        real = Path(os.path.realpath(file))
        name = f"{file} is a link to {real}, which" if file.is_symlink() else f"{file}"
        if os.statvfs(real.parent).f_flag & os.ST_RDONLY:
            raise InputError(f"{name} is on a read-only file system; save elsewhere with `output`")
        if not os.access(real.parent, os.W_OK | os.X_OK):
            raise InputError(f"{name} is in a folder that is read-only; save elsewhere with `output`")
        reason = _reason(file, real, named)
        if reason:
            raise InputError(f"{name} {reason}; save elsewhere with `output`, or overwrite it with `force`")


def _reason(file: Path, real: Path, named: Path) -> str | None:
    is_link, folder = file.name != real.name, real.parent.name  # some stores use the first two digits as the folder
    in_store = len(folder) == 2 and re.fullmatch(_DIGEST, folder + real.stem)
    if in_store or (_LINKED.search(real.name) if is_link else _NAMED.fullmatch(real.stem)):
        return "is named by a digest of its content, so others rely on its content"
    status = real.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o222 or not os.access(real, os.W_OK):
        return f"is read-only (mode {mode:04o})"
    if file != named and real.parent != Path(os.path.realpath(file.parent)):
        return "is outside the folder that you gave"
    if status.st_nlink > 1 + _own_links(real, status):
        return f"has {status.st_nlink} hard links, of which only this one would be changed"
    if not os.access(real, os.R_OK):
        return "cannot be read"
    with Source(real).reading() as opened:
        start = opened.read(_START)
    is_checkpoint = not start or any(format_.recognizes(real, start) for format_ in FORMATS)  # empty: may become any
    return None if is_checkpoint else "is not a checkpoint"


def _own_links(real: Path, status: os.stat_result) -> int:
    """Return how many other names of a file are backups, or those of a save that is running."""
    own = [*real.parent.glob(".convsim-*/*"), *real.parent.glob(f"{escape(real.name)}.bak*")]
    found = 0
    for name in own:
        with suppress(OSError):  # it has been moved to its place
            found += os.path.samestat(name.lstat(), status)
    return found
