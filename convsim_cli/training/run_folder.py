"""A run's folder: `args.json` (its arguments), `results.csv`, its checkpoints, and `summary.json` once it is finished.

Every file is replaced as a whole. `last.safetensors` and `best.safetensors` are the network after its last and its best
epoch; `state.pt` is what a bit-exact resume needs (see `run_state`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NoReturn

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.errors import BusyError, InputError
from convsim_cli.networks.third_party import names_code
from convsim_cli.training.arguments import FOLDER, Arguments, make_arguments, parse_arguments
from convsim_cli.training.run_data import identified

_ARGUMENTS = "args.json"


@dataclass(frozen=True)
class Run:
    """A run's folder and its arguments."""

    folder: Path
    arguments: Arguments

    @property
    def name(self) -> str:
        return self.folder.name


def create_run(arguments: Arguments, run_dir: Path, name: str | None) -> Run:
    """Create the folder of a new run: of this name, or of one made from the arguments.

    No two processes ever get the same folder. Raises InputError if the name is taken.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.mode}-s{arguments.seed}")
    check_name(stem)
    make_folder(run_dir)
    run = create_first_free(arguments, run_dir, [stem] if name else numbered(stem))
    return run or _refuse_taken(run_dir / stem, arguments.arch)


def create_first_free(arguments: Arguments, run_dir: Path, names: Iterable[str]) -> Run | None:
    """Create the first of these folders that does not exist; None if all of them do."""
    arguments = identified(arguments)
    for name in names:
        folder = run_dir / name
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        run = Run(folder, arguments)
        try:
            write_arguments(run)
        except BaseException:
            remove_unsaved(run, keep_parent=True)
            raise
        return run
    return None


def remove_unsaved(run: Run, keep_parent: bool) -> None:
    """Remove a run's folder that holds its arguments at most, and its parent if that is empty too."""
    if all(path.name == _ARGUMENTS for path in run.folder.iterdir()):
        (run.folder / _ARGUMENTS).unlink(missing_ok=True)
        run.folder.rmdir()
        if not keep_parent:
            with suppress(OSError):  # not empty
                run.folder.parent.rmdir()


def free_stem(arguments: Arguments, run_dir: Path, name: str | None, seeds: Iterable[int]) -> str:
    """Return a stem for which the folders STEM-sSEED of all seeds are free: the name, or one from the arguments.

    Raises InputError if a folder of the given name is taken.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.mode}")
    check_name(stem)
    for candidate in [stem] if name else numbered(stem):
        taken = [folder for seed in seeds if (folder := run_dir / f"{candidate}-s{seed}").exists()]
        if not taken:
            return candidate
    return _refuse_taken(taken[0], arguments.arch)


def open_run(folder: Path, **changes: Any) -> Run:
    """Open a run's folder, with changes to its arguments, such as more `epochs` or another `data_dir`.

    Raises InputError for a folder that is not a run's, and for arguments that this version does not know.
    """
    path = folder / _ARGUMENTS
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run's folder (no readable args.json)") from error
    return Run(folder, replace(make_arguments(values, path), **changes))


def open_to_resume(folder: Path, given: Mapping[str, Any]) -> Run:
    """Open a run's folder to resume it with the given arguments: `epochs`, and where its data lies.

    Others may be given if they are those of the run; `arch` must be, where it names code to run: a file alone runs
    none. Raises InputError for one that differs; as `open_run`.
    """
    run = open_run(folder)
    had = asdict(run.arguments)
    for name, value in given.items():
        if name not in had:
            raise InputError(f"`{name}` cannot be combined with `resume`")
        if name == "epochs" and value != had[name] and name in run.arguments.identity():
            raise InputError(
                f"`epochs` {value}: the run {folder} has {had[name]}, and its learning rates depend on their number "
                f"(`schedule` {run.arguments.schedule}); start a new run"
            )
        moved = name == "dataset" and run.arguments.folder_digest and value.startswith(FOLDER)
        if value != had[name] and name not in ("epochs", "data_dir") and not moved:
            raise InputError(
                f"`{name}` {value}: the run {folder} has {had[name]}; "
                "with `resume` only `epochs` and `data_dir` may differ, and the place of a folder:PATH"
            )
    _refuse_code(run.arguments.arch, folder / _ARGUMENTS, given, train_command("resume", folder, run.arguments.arch))
    return replace(run, arguments=replace(run.arguments, **given))


def read_config(path: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """Return by name the arguments that an args.json holds, for another run, without those that are given.

    Raises InputError, also for an `arch` that names code to run: it must be given.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"`config` {path}: not a readable args.json ({error})") from error
    arguments = parse_arguments(values, path)
    arch = arguments.get("arch", "")
    _refuse_code(arch, path, given, train_command("config", path, arch))
    return {name: value for name, value in arguments.items() if name not in given}


def train_command(option: Literal["resume", "config"], path: Path, arch: str) -> str:
    """Return the command that resumes a run, or starts another from its args.json.

    It repeats the run's network where that names code to run: a file alone runs none.
    """
    return f"convsim train --{option} {quote(str(path))}" + (f" --arch {quote(arch)}" if names_code(arch) else "")


def _refuse_code(arch: str, file: Path, given: Collection[str], command: str) -> None:
    if names_code(arch) and "arch" not in given:
        raise InputError(
            f"{file}: names the network {arch}, whose code would run; if you trust it, repeat its name: {command}"
        )


def write_arguments(run: Run) -> None:
    """Replace the run's args.json. Raises WriteError."""
    write_json(run.folder / _ARGUMENTS, asdict(run.arguments))


def write_json(path: Path, document: Any) -> None:
    """Replace a file by a JSON document. Raises WriteError."""
    data = (json.dumps(document, indent=2) + "\n").encode()
    replace_file(path, lambda file: file.write(data))


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a folder. The lock ends with the process, even if it is killed.

    wait: until another process releases it. Raises BusyError if another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{folder}: another process is working on this run") from None
        yield
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`run_dir` {path}: cannot be created ({error.strerror})") from error


def check_name(name: str) -> None:
    """Raise InputError for a name that is not a plain folder name."""
    if Path(name).name != name or name in (".", ".."):
        raise InputError(f"`name` {name!r}: expected a plain folder name; `run_dir` says where the folder goes")


def plain_name(text: str) -> str:
    """Return a text as a folder name."""
    return text.replace(":", "").replace("/", "-")


def numbered(stem: str) -> Iterator[str]:
    """Yield STEM, STEM-2, STEM-3, …"""
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def _refuse_taken(folder: Path, arch: str) -> NoReturn:
    command = train_command("resume", folder, arch)
    raise InputError(f"{folder} already exists; resume it with: {command}, or choose another `name`")
