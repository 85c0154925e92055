"""Launch training: start new runs, resume a run, or find the run trained with the same arguments.

Each new run gets a folder of its own, named after its arguments unless it is given a name. A run is identified by its
arguments, not by its name: finished runs are reused, and unfinished ones resumed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from convsim_cli.checkpoints.journal import is_scratch
from convsim_cli.device import read_json
from convsim_cli.errors import BusyError, InputError, brief
from convsim_cli.inputs.images import Dataset
from convsim_cli.networks.architectures import find_network, to_repeat
from convsim_cli.settings import declarations
from convsim_cli.training.config import FOLDER, Arguments, parse_arguments
from convsim_cli.training.distributed import Processes, join_processes, locked
from convsim_cli.training.prepare import build_with_weights, check_network, identified, import_summary_writer, load_data
from convsim_cli.training.run import (
    ARGUMENTS_FILE,
    Run,
    RunCallbacks,
    command_to_train,
    epochs_done,
    open_run,
    train_run,
    write_json,
)

LONGEST_NAME = 240  # bytes: file systems take 255, and seeds and numbers are appended


def start_runs(
    arguments: Arguments, run_dir: Path, name: str | None, seeds: int | None, callbacks: RunCallbacks
) -> list[tuple[Run, dict[str, Any]]]:
    """Train new runs and return them with their summaries; on other ranks than 0, nothing.

    name: of the run's folder, or with seeds of the folders NAME-sSEED; from the arguments if None. seeds: how many
    runs, from the arguments' seed on; None for one run. Raises InputError before any folder is created, and as
    `create_run` and `train_run`; the folder of a run that failed before its first save is removed.
    """
    run_dir_existed = os.path.exists(run_dir)  # noqa: PTH110 - also of a name that is too long
    last, most = arguments.seed + (seeds or 1) - 1, declarations(Arguments)["seed"].most
    if last > most >= arguments.seed:
        raise InputError(f"`seeds` {seeds}: the last run would have `seed` {last}, expected at most {most}")
    with join_processes(torch.device(arguments.device)) as processes:
        arguments = replace(arguments, processes=processes.size)
        checked, data = processes.rank_zero_first(lambda: _load_checked(arguments))
        arguments = processes.on_rank_zero(lambda: identified(arguments))  # once, for all seeds
        finished: list[tuple[Run, dict[str, Any]]] = []
        for run in _new_runs(arguments, run_dir, name, seeds, processes):
            made = processes.on_rank_zero(run.folder.stat)
            model = None if finished else checked  # the next seed has a network of its own
            try:
                finished.append((run, train_run(run, callbacks, data, processes, model)))
            except BusyError:  # the run is another process's now
                raise
            except Exception:  # an interrupted run is kept
                if processes.is_rank_zero:
                    remove_unsaved(run, made, run_dir_existed)
                raise
    return finished if processes.is_rank_zero else []


def resume_run(run: Run, callbacks: RunCallbacks) -> list[tuple[Run, dict[str, Any]]]:
    """Train an interrupted or extended run to its number of epochs; on other ranks than 0, return nothing.

    Raises as `train_run`.
    """
    with join_processes(torch.device(run.arguments.device)) as processes:
        finished = run, train_run(run, callbacks, None, processes)
    return [finished] if processes.is_rank_zero else []


def _load_checked(arguments: Arguments) -> tuple[nn.Module, Dataset]:
    """Return a run's network and dataset, after every check that needs no folder."""
    arguments.check()
    if arguments.tensorboard:
        import_summary_writer()
    find_network(arguments.arch, arguments.pretrained)  # before a dataset is downloaded
    dataset = load_data(arguments)
    model = build_with_weights(arguments, dataset.classes)
    check_network(model, arguments, dataset)
    return model, dataset


def _new_runs(
    arguments: Arguments, run_dir: Path, name: str | None, seeds: int | None, processes: Processes
) -> Iterator[Run]:
    """Yield the runs. Each folder is created only when its run begins."""
    if seeds is None:
        yield processes.on_rank_zero(lambda: create_run(arguments, run_dir, name))
        return
    numbers = range(arguments.seed, arguments.seed + seeds)
    stem = processes.on_rank_zero(lambda: free_stem(arguments, run_dir, name, numbers))
    for seed in numbers:
        one = replace(arguments, seed=seed)
        yield processes.on_rank_zero(partial(create_run, one, run_dir, f"{stem}-s{seed}", or_next=name is None))


def create_run(arguments: Arguments, run_dir: Path, name: str | None, or_next: bool = False) -> Run:
    """Create the folder of a new run: of this name, or of one made from the arguments.

    No two processes ever get the same folder. or_next: if the name is taken, add a number to it, as to one made from
    the arguments. Raises InputError if the name is taken.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.label}-s{arguments.seed}")
    check_name(stem)
    make_folder(run_dir)
    arguments = identified(arguments)  # not while others wait
    with locked(run_dir, wait=True):
        run = create_first_free(arguments, run_dir, [stem] if name and not or_next else numbered(stem))
    return run or _refuse_taken(run_dir / stem, arguments)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"`run_dir` {path}: exists but is not a folder; name another one") from error
    except (OSError, RecursionError) as error:  # mkdir calls itself for each missing parent
        raise InputError(f"`run_dir` {path}: cannot be created ({brief(error)})") from error


def create_first_free(arguments: Arguments, run_dir: Path, names: Iterable[str]) -> Run | None:
    """Create the first of these folders that is free, with `run_dir` locked; None if none of them is.

    arguments: `identified`.
    """
    for name in names:
        folder = run_dir / name
        if not is_free(folder):
            continue
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be created ({error.strerror})") from error
        run, made = Run(folder, arguments), folder.stat()
        try:
            write_json(folder / ARGUMENTS_FILE, asdict(arguments))
        except BaseException:
            remove_unsaved(run, made, keep_parent=True)
            raise
        return run
    return None


def is_free(folder: Path) -> bool:
    """Return whether a run can have a folder: there is nothing of its name, or what a kill leaves of a new folder."""
    with suppress(OSError):  # no folder, or one that cannot be looked into
        if not os.path.lexists(folder):
            return True
        return not folder.is_symlink() and all(map(is_scratch, folder.iterdir()))
    return False


def remove_unsaved(run: Run, made: os.stat_result, keep_parent: bool) -> None:
    """Remove a run's folder that contains at most its arguments, and its parent if that is empty too.

    made: what tells it from another folder that has taken its name since.
    """
    if not run.folder.exists() or not os.path.samestat(run.folder.stat(), made):
        return
    if all(path.name == ARGUMENTS_FILE for path in run.folder.iterdir()):
        (run.folder / ARGUMENTS_FILE).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or something is mounted there
            run.folder.rmdir()
            if not keep_parent:
                run.folder.parent.rmdir()


def free_stem(arguments: Arguments, run_dir: Path, name: str | None, seeds: Iterable[int]) -> str:
    """Return a stem for which the folders STEM-sSEED of all seeds are free: the name, or one from the arguments.

    Raises InputError if a folder of the given name is taken.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.label}")
    check_name(stem)
    for candidate in [stem] if name else numbered(stem):
        taken = [folder for seed in seeds if not is_free(folder := run_dir / f"{candidate}-s{seed}")]
        if not taken:
            return candidate
    return _refuse_taken(taken[0], arguments)


def plain_name(text: str) -> str:
    """Return a text as a folder name."""
    return text.replace(":", "").replace("/", "-")


def numbered(stem: str) -> Iterator[str]:
    """Yield STEM, STEM-2, STEM-3, …"""
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def check_name(name: str) -> None:
    """Raise InputError for a name that is not a plain folder name, or too long for one."""
    if Path(name).name != name or name in (".", "..") or "\0" in name:
        raise InputError(f"`name` {name!r}: expected a plain folder name; `run_dir` says where the folder goes")
    if (size := len(os.fsencode(name))) > LONGEST_NAME:
        raise InputError(f"`name` {name}: has {size} bytes, expected at most {LONGEST_NAME}")


def _refuse_taken(folder: Path, arguments: Arguments) -> NoReturn:
    resume = ""
    with suppress(InputError):
        own = open_run(folder).arguments
        if own.identity() == arguments.identity():
            command = command_to_train("resume", folder, to_repeat(own.arch, own.weights), own.processes)
            resume = f"resume it with: {command}, or "
        else:
            resume = "it holds another run; "
    raise InputError(f"{folder} already exists; {resume}choose another `name`")


def open_to_resume(folder: Path, given: Mapping[str, Any]) -> Run:
    """Open a run's folder to resume it with the given arguments: `epochs`, and where its data lies.

    Others may be given if they are those of the run; `arch` and `weights` must be, where `to_repeat` finds them. Raises
    InputError for one that differs; as `open_run`.
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
                "with `resume` only `epochs`, `data_dir` and the path of a folder:PATH may change"
            )
    repeated = to_repeat(run.arguments.arch, run.arguments.weights)
    command = command_to_train("resume", folder, repeated, run.arguments.processes)
    _require_repeated(repeated, folder / ARGUMENTS_FILE, given, command)
    return replace(run, arguments=replace(run.arguments, **given))


def read_config(path: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """Return by name the arguments that an args.json holds, for another run, without those that are given.

    Raises InputError, also where `to_repeat` finds one that is not given.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"`config` {path}: not a readable args.json ({brief(error)})") from error
    arguments = parse_arguments(values, path)
    repeated = to_repeat(arguments.get("arch", ""), arguments.get("weights"))
    _require_repeated(repeated, path, given, command_to_train("config", path, repeated))
    return {name: value for name, value in arguments.items() if name not in given}


def _require_repeated(repeated: Mapping[str, str], file: Path, given: Collection[str], command: str) -> None:
    what = {"arch": "the network {}, whose code would run", "weights": "the weights {}, which would be downloaded"}
    for name, value in repeated.items():
        if name not in given:
            raise InputError(f"{file}: names {what[name].format(value)}; if you trust it, repeat its name: {command}")


def find_run(arguments: Arguments, run_dir: Path) -> Run | None:
    """Return the run in `run_dir` with these arguments that has done most epochs, or None.

    Neither the place of the data nor the number of epochs has to agree: no epoch depends on how many follow, so a
    shorter run can be continued, and a longer one serves with its first epochs. With a cosine schedule every epoch
    does, and only a run of the same length serves. A run configured for more epochs that has not yet reached the
    requested number is not reused.
    """
    arguments = identified(arguments)
    wanted, found = arguments.identity(), []
    for path in sorted(run_dir.glob(f"*/{ARGUMENTS_FILE}")):
        try:
            run = open_run(path.parent)
        except InputError:
            continue  # of a later version, or being written
        if run.arguments.identity() == wanted and (
            run.arguments.epochs <= arguments.epochs or epochs_done(run.folder) >= arguments.epochs
        ):
            found.append(run)
    return max(found, key=lambda run: epochs_done(run.folder), default=None)


def find_or_create_run(arguments: Arguments, run_dir: Path, stem: str) -> Run:
    """Return the run with these arguments, created if there is none. Processes that ask at once get the same run."""
    make_folder(run_dir)
    arguments = identified(arguments)
    with locked(run_dir, wait=True):
        run = find_run(arguments, run_dir) or create_first_free(arguments, run_dir, numbered(stem))
    assert run is not None  # there is always a free number
    epochs = max(run.arguments.epochs, arguments.epochs)
    here = replace(run.arguments, epochs=epochs, data_dir=arguments.data_dir, dataset=arguments.dataset)
    return replace(run, arguments=here)


def is_finished(run: Run, epochs: int) -> bool:
    """Return whether a run has done this many epochs, and has its summary unless it is to continue."""
    done = epochs_done(run.folder) >= epochs
    return done and (run.arguments.epochs > epochs or (run.folder / "summary.json").exists())
