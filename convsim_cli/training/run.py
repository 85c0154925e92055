"""A run's folder: `args.json` (its arguments), `results.csv`, its checkpoints, and `summary.json` once it is finished.

Every file is replaced as a whole. `last.safetensors` and `best.safetensors` are the network after its last and its best
epoch; `state.pt` is what a bit-exact resume needs (see `run_state`).

A run's `results.csv`: one row per epoch.

What a run saves after every epoch: its weights, its results, and `state.pt`, which a bit-exact resume needs.

`state.pt` is replaced last and alone says how far the run has come: after a crash, the run repeats the unfinished
epoch, with the same result.

A finished run's `summary.json`.

Carry out a training run, from its start or from its last whole epoch.

A run's results for TensorBoard, in the folder `tensorboard` of the run. TensorBoard is an extra of that name.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from shlex import quote
from statistics import mean
from typing import Any, Literal, NoReturn, Protocol

import torch
from torch import nn

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.formats import open_checkpoint, save_state_dict
from convsim_cli.checkpoints.pickle_format import write_pickle
from convsim_cli.errors import BusyError, CheckpointError, ConvsimWarning, InputError, WriteError
from convsim_cli.inputs.images import Dataset
from convsim_cli.measurement.network import fm_cos_by_layer
from convsim_cli.networks.architectures import build_network, count_parameters, names_code
from convsim_cli.training.config import FOLDER, MODES, Arguments, make_arguments, parse_arguments
from convsim_cli.training.data import identified, load_data, used_images
from convsim_cli.training.distributed import ALONE, Processes
from convsim_cli.training.prepare import build_with_weights, count_steps, first_images, prepare_
from convsim_cli.training.trainer import VALIDATION_COLUMNS, Trainer, choose_algorithms

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


COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "cs", "seconds")
FILE = "results.csv"
LAST_EPOCHS = 5  # that the mean of the last test accuracies is over
Row = dict[str, Any]


def read_results(folder: Path) -> list[Row]:
    """Return a run's results as rows of numbers. Raises InputError if there are none, or the file is damaged."""
    try:
        with (folder / FILE).open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = tuple(reader.fieldnames or ())
            if columns not in (COLUMNS, COLUMNS + VALIDATION_COLUMNS):
                raise ValueError(f"its columns are {reader.fieldnames}")
            return [{key: int(row[key]) if key == "epoch" else float(row[key]) for key in columns} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{folder}: not a run's folder (no readable {FILE}: {error})") from error


def write_results(folder: Path, history: Sequence[Row], validated: bool = False) -> None:
    """Replace a run's results. validated: whether it has validation images. Raises WriteError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS + VALIDATION_COLUMNS * validated, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    data = text.getvalue().encode()
    replace_file(folder / FILE, lambda file: file.write(data))


def best_row(history: Sequence[Row]) -> Row:
    """Return the row of the best epoch, by validation accuracy if there is one; the first if several are equal."""
    return max(history, key=lambda row: row["validation_accuracy" if "validation_accuracy" in row else "test_accuracy"])


def epochs_done(folder: Path) -> int:
    """Return how many whole epochs a run has in its results, 0 if it has none yet."""
    return len(read_results(folder)) if (folder / FILE).exists() else 0


Log = dict[str, Any]  # "history": the rows so far; "fm_cos_start": `fm_cos` per layer, before training


def save_state(run: Run, trainer: Trainer, log: Log) -> None:
    """Save a run between two epochs. Rank 0 writes; all processes must call this. Raises WriteError."""
    state = {"arguments": asdict(run.arguments), "progress": log, "trainer": trainer.state()}
    trainer.processes.on_rank_zero(lambda: _write(run, trainer, log["history"], state))


def check_resumable(run: Run) -> None:
    """Raise InputError for a run that has lost its state after an epoch: starting over would overwrite its results."""
    path = run.folder / "state.pt"
    if path.exists():
        return
    done = epochs_done(run.folder)
    found = [f"results.csv with {done} epoch{'s' if done > 1 else ''}"] if done else []
    found += [name for name in ("last.safetensors", "best.safetensors") if _is_trained(run.folder / name)]
    found += ["summary.json"] if (run.folder / "summary.json").exists() else []
    if found:
        another = train_command("config", run.folder / "args.json", run.arguments.arch)
        raise InputError(
            f"{path}: missing, so the run cannot be resumed, and starting over would overwrite {', '.join(found)}; "
            f"move {run.folder} away, or start another run: {another} --name NEW"
        )


def _is_trained(weights: Path) -> bool:
    """Whether a run's weights may be those of an epoch: all but those that say that they are from before the first."""
    if not weights.exists():
        return False
    try:
        return open_checkpoint(weights).metadata.get("convsim.epoch") != "0"
    except CheckpointError:
        return True


def read_state(run: Run) -> dict[str, Any] | None:
    """Return what `save_state` saved, None for a run that has not got so far.

    Raises InputError for a damaged state, one of another run, one of more epochs than the run is to have, and as
    `check_resumable`.
    """
    check_resumable(run)
    path = run.folder / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        former, done = make_arguments(state["arguments"], path), int(state["trainer"]["epoch"])
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(
            f"{path}: damaged ({type(error).__name__}), so the run cannot be resumed; its last.safetensors may be "
            f"intact; remove {run.folder} to train it again"
        ) from error
    _check_same(run, former)
    if run.arguments.epochs < done:
        raise InputError(f"{run.folder}: has done {done} epochs, more than `epochs` {run.arguments.epochs}")
    return state


def _check_same(run: Run, former: Arguments) -> None:
    saved, wanted = former.identity(), run.arguments.identity()
    for name in (*wanted, *saved):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{run.folder / 'state.pt'}: belongs to a run with {name} = {saved.get(name)!r}, "
                f"args.json says {wanted.get(name)!r}"
            )


def _write(run: Run, trainer: Trainer, history: list[Row], state: dict[str, Any]) -> None:
    record = {
        "convsim.epoch": str(trainer.epoch),
        "convsim.mode": run.arguments.mode,
        "convsim.arch": run.arguments.arch,
    }
    weights = trainer.model.state_dict()
    save_state_dict(weights, run.folder / "last.safetensors", record)
    if history and best_row(history) is history[-1]:
        save_state_dict(weights, run.folder / "best.safetensors", record)
    write_results(run.folder, history, validated=run.arguments.validation is not None)
    replace_file(run.folder / "state.pt", lambda file: write_pickle(file, state))


FEATURE_MAP_IMAGES = 16  # the first test images, over which `fm_cos` is taken


def feature_map_cosines(
    model: nn.Module, dataset: Dataset, device: torch.device, kernels_changed: bool = False
) -> dict[str, float | None]:
    """Return `fm_cos` per layer on the first test images.

    kernels_changed: since the batch-norm statistics were stored, so that those of the images serve instead.
    """
    images = dataset.normalize(dataset.test.images[:FEATURE_MAP_IMAGES].to(device))
    return fm_cos_by_layer(model, images, kernels_changed)


def summarize_run(trainer: Trainer, log: Log) -> dict[str, Any]:
    """Return the summary of a run: accuracies in per cent, `seconds` and `images_per_second` of its epochs.

    `classes` has the number of training and test images of each class, in the order of the network's outputs.
    """
    history: list[Row] = log["history"]
    best = best_row(history)
    seconds = sum(row["seconds"] for row in history)
    validated = {"best_validation_accuracy": best["validation_accuracy"]} if "validation_accuracy" in best else {}
    return {
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        **validated,
        "last_test_accuracy": history[-1]["test_accuracy"],
        "mean_last5_test_accuracy": mean(row["test_accuracy"] for row in history[-LAST_EPOCHS:]),
        "last_train_accuracy": history[-1]["train_accuracy"],
        "cs": history[-1]["cs"],
        "beta": trainer.beta if trainer.mode.regularizes else None,
        "fm_cos": {
            "start": log["fm_cos_start"],
            "end": feature_map_cosines(trainer.model, trainer.dataset, trainer.device),
        },
        "classes": trainer.dataset.images_of_classes(),
        "parameters": count_parameters(trainer.model),
        "epochs": len(history),
        "seconds": seconds,
        "images_per_second": len(history) * len(trainer.dataset.train) / seconds,
    }


class Listener(Protocol):
    """What a run reports while it is carried out."""

    def data(self, dataset: Dataset) -> None:
        """The run's images are loaded."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of this many steps begins: `init`, then `epoch N`."""

    def advance(self, steps: int) -> None:
        """Steps of the phase are done."""

    def row(self, row: Row) -> None:
        """An epoch has ended."""


class Silence:
    """A listener that does nothing."""

    def data(self, dataset: Dataset) -> None: ...

    def phase(self, name: str, steps: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def row(self, row: Row) -> None: ...


def execute(
    run: Run, listener: Listener | None = None, dataset: Dataset | None = None, processes: Processes = ALONE
) -> dict[str, Any]:
    """Train a run to its number of epochs, resuming after its last whole epoch, and return its summary.

    dataset: the run's whole data set, if it is loaded already. Only rank 0 touches the folder; the other processes
    return an empty summary. Raises DivergedError (the last good checkpoint is kept), InputError for a damaged
    `state.pt`, a lost one or that of another run, and BusyError for a run that another process is working on.
    """
    listener = listener or Silence()
    arguments = run.arguments
    arguments.check()
    _check_processes(run, processes)
    choose_algorithms(arguments.deterministic)
    with ExitStack() as held:
        processes.on_rank_zero(lambda: held.enter_context(locked(run.folder)))
        state = processes.on_rank_zero(lambda: read_state(run))  # refused before a data set is downloaded
        data = used_images(arguments, dataset or load_data(arguments))
        listener.data(data)
        trainer, log = _resume(run, data, state, processes) if state else _start(run, data, listener, processes)
        if processes.is_rank_zero:
            _update_folder(run, trainer.epoch)
        log_row = _open_log(run, trainer, held)
        while trainer.epoch < arguments.epochs:
            listener.phase(f"epoch {trainer.epoch + 1}/{arguments.epochs}", trainer.steps)
            row = trainer.run_epoch(listener.advance)
            log["history"].append(row)
            log_row(row)
            save_state(run, trainer, log)
            listener.row(row)
        if not processes.is_rank_zero:
            return {}
        summary = summarize_run(trainer, log)
        write_json(run.folder / "summary.json", summary)
    return summary


def _open_log(run: Run, trainer: Trainer, held: ExitStack) -> Callable[[Row], None]:
    """What takes each epoch's row on rank 0: TensorBoard's log if the run has one, else nothing."""
    if not run.arguments.tensorboard:
        return lambda row: None
    logs: list[Callable[[Row], None]] = []
    opened = tensorboard_log(run.folder, trainer.epoch + 1)
    trainer.processes.on_rank_zero(lambda: logs.append(held.enter_context(opened)))
    return lambda row: trainer.processes.on_rank_zero(lambda: logs[0](row))


def _check_processes(run: Run, processes: Processes) -> None:
    began, now = run.arguments.processes, processes.size
    if began == now:
        return
    before, how = f"{began} processes", f"use torchrun --nproc-per-node {began}"
    if began == 1:
        before, how = "1 process", "resume it without torchrun"
    raise InputError(f"{run.folder} was started with {before}, but this launch has {now}; {how}")


def _update_folder(run: Run, epochs_done: int) -> None:
    if open_run(run.folder).arguments != run.arguments:
        write_arguments(run)
    if epochs_done < run.arguments.epochs:
        (run.folder / "summary.json").unlink(missing_ok=True)  # only a finished run has one


def _start(run: Run, data: Dataset, listener: Listener, processes: Processes) -> tuple[Trainer, Log]:
    arguments, device = run.arguments, _device(run, processes)
    if processes.is_rank_zero:
        _warn_of_nothing_to_hold(arguments)
    model = build_with_weights(arguments, data.classes).to(device)
    torch.manual_seed(arguments.seed + processes.rank)  # rank 0 draws what a single process would
    prepared = MODES[arguments.mode].directions is not None
    if prepared:  # on rank 0 only: the other processes receive its weights
        listener.phase("init", count_steps(model, arguments))
        images = partial(first_images, data, device)
        processes.on_rank_zero(lambda: prepare_(model, arguments, images, listener.advance))
    trainer = Trainer(model, data, arguments, device, processes)
    cosines = feature_map_cosines(model, data, device, prepared) if processes.is_rank_zero else {}
    log: Log = {"history": [], "fm_cos_start": cosines}
    save_state(run, trainer, log)
    return trainer, log


def _warn_of_nothing_to_hold(arguments: Arguments) -> None:
    lowered = arguments.preserve_norm or arguments.weights or MODES[arguments.mode].lowers
    if arguments.hold_similarity and not lowered:
        modes = ", ".join(mode.name for mode in MODES.values() if mode.lowers)
        warnings.warn(
            f"`hold_similarity` has nothing to hold: `mode` {arguments.mode} leaves ncs near 1 at the start; "
            f"use `mode` {modes}, or init with `preserve_norm`",
            ConvsimWarning,
            stacklevel=2,
        )


def _resume(run: Run, data: Dataset, state: dict[str, Any], processes: Processes) -> tuple[Trainer, Log]:
    arguments, device = run.arguments, _device(run, processes)
    model = build_network(arguments.arch, data.classes, arguments.seed)
    trainer = Trainer(model, data, arguments, device, processes)
    trainer.load_state(state["trainer"])
    if processes.is_rank_zero:
        write_results(run.folder, state["progress"]["history"], validated=arguments.validation is not None)
    return trainer, state["progress"]


def _device(run: Run, processes: Processes) -> torch.device:
    """This process's device: of several on CUDA, the one that it has taken."""
    device = torch.device(run.arguments.device)
    return torch.device("cuda", torch.cuda.current_device()) if processes.size > 1 and device.type == "cuda" else device


TENSORBOARD_FOLDER = "tensorboard"
RowLog = Callable[[Row], None]


def summary_writer() -> Any:
    """Return torch's class that writes for TensorBoard. Raises InputError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "`tensorboard` requires the package tensorboard, which is not installed: "
            "pip install 'convsim[tensorboard]', or pip install tensorboard"
        ) from error
    return SummaryWriter


@contextmanager
def tensorboard_log(run: Path, next_epoch: int) -> Iterator[RowLog]:
    """Yield what writes a row of results: each column is a scalar of its name, over epochs.

    next_epoch: the first one that is to come; TensorBoard hides what a crash has left of it. Raises InputError if the
    package is missing, and WriteError.
    """
    folder = run / TENSORBOARD_FOLDER
    writer = _written(folder, lambda: summary_writer()(str(folder), purge_step=next_epoch))

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    try:
        yield lambda row: _written(folder, lambda: write(row))
    finally:
        writer.close()


def _written(folder: Path, write: Callable[[], Any]) -> Any:
    try:
        return write()
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from error
