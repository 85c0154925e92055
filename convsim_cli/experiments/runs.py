"""A run's folder: its arguments, its results, its checkpoints, and how it goes on after an interruption.

`args.json` (the arguments), `results.csv` (a row per epoch), `best.safetensors` and `last.safetensors`, `state.pt` (all
that a bit-exact resume needs) and, once finished, `summary.json`. Every file is replaced whole, and `state.pt` last: it
alone says how far the run has come, and a run that was killed does the unfinished epoch again, to the same result.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import mean
from types import NoneType
from typing import Any, NoReturn, Protocol, get_args, get_type_hints

import torch
from torch import Tensor, nn

from convsim_cli.atomic import replace_file
from convsim_cli.checkpoint import open_checkpoint
from convsim_cli.errors import BusyError, InputError, did_you_mean
from convsim_cli.experiments.datasets import Dataset, load_dataset, parse_channels
from convsim_cli.experiments.networks import (
    CLASSES,
    build_network,
    count_parameters,
    load_weights,
    usual_side,
)
from convsim_cli.experiments.processes import ALONE, Processes
from convsim_cli.experiments.training import Arguments, Trainer, be_deterministic, preparation_steps, prepare_
from convsim_cli.kernels import module_kernels
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.pickle_format import write_pickle
from convsim_cli.report import feature_maps
from convsim_cli.state_dict import save_state_dict

COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "cs", "seconds")
FEATURE_MAP_IMAGES = 16  # test images that the summary's fm_cos is taken over

Row = dict[str, Any]


class Listener(Protocol):
    """What a run tells whoever watches."""

    def phase(self, name: str, steps: int) -> None:
        """A new phase begins: `init`, then `epoch N`."""

    def advance(self, steps: int) -> None:
        """Steps of the phase were done."""

    def row(self, row: Row) -> None:
        """An epoch ended."""


class Silence:
    """A listener that says nothing."""

    def phase(self, name: str, steps: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def row(self, row: Row) -> None: ...


@dataclass(frozen=True)
class Run:
    """A run's folder and its arguments."""

    folder: Path
    arguments: Arguments

    @property
    def name(self) -> str:
        return self.folder.name


def create_run(arguments: Arguments, run_dir: Path, name: str | None) -> Run:
    """Make a folder of its own for a new run, without a name one called after the arguments.

    Raises InputError where the given name is taken; never shares a folder with another process.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.mode}-s{arguments.seed}")
    check_name(stem)
    make_folder(run_dir)
    run = _first_free(arguments, run_dir, [stem] if name else _numbered(stem))
    return run or _refuse_taken(run_dir / stem)


def free_stem(arguments: Arguments, run_dir: Path, name: str | None, seeds: Iterable[int]) -> str:
    """Return what to call the runs STEM-sSEED of several seeds: `name`, or after the arguments a stem that is free.

    Raises InputError where a folder of the given name is taken.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.mode}")
    check_name(stem)
    for candidate in [stem] if name else _numbered(stem):
        taken = [folder for seed in seeds if (folder := run_dir / f"{candidate}-s{seed}").exists()]
        if not taken:
            return candidate
    return _refuse_taken(taken[0])


def check_name(name: str) -> None:
    """Raise InputError for a name that is no plain folder name."""
    if Path(name).name != name or name in (".", ".."):
        raise InputError(f"--name {name!r}: expected a plain folder name; its place is --run-dir")


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run-dir {path}: cannot be made ({error.strerror})") from error


def _refuse_taken(folder: Path) -> NoReturn:
    raise InputError(f"{folder}: there already; go on with --resume {folder}, or take another --name")


def find_run(arguments: Arguments, run_dir: Path) -> Run | None:
    """Return the run in `run_dir` that was given these arguments, or None.

    Where the data is does not matter, nor for how many epochs the run was meant: nothing that it does in an epoch
    depends on how many are to follow, so that one of fewer goes on to those asked for. Only one that was meant for more
    and has not done as many yet is left alone. A run with more done comes before one with less.
    """
    found = [run for run in map(_readable_run, sorted(run_dir.glob("*/args.json"))) if run and _fits(run, arguments)]
    return max(found, key=epochs_done, default=None)


def find_or_create_run(arguments: Arguments, run_dir: Path, stem: str) -> Run:
    """Return the run with these arguments, made if need be; two processes that ask at once get the same."""
    make_folder(run_dir)
    with _locked(run_dir, wait=True):
        run = find_run(arguments, run_dir) or _first_free(arguments, run_dir, _numbered(stem))
    assert run is not None  # the names are endless
    epochs = max(run.arguments.epochs, arguments.epochs)
    return replace(run, arguments=replace(run.arguments, epochs=epochs))


def epochs_done(run: Run) -> int:
    """Return how many whole epochs stand in a run's results."""
    return len(read_results(run.folder)) if (run.folder / "results.csv").exists() else 0


def is_finished(run: Run, epochs: int) -> bool:
    """Return whether a run has nothing left to do for so many epochs."""
    return epochs_done(run) >= epochs and (run.arguments.epochs > epochs or (run.folder / "summary.json").exists())


def plain_name(text: str) -> str:
    """Return a text as a folder's name."""
    return text.replace(":", "").replace("/", "-")


def load_inputs(arguments: Arguments) -> Dataset:
    """Return a run's data set, having tried its network and weights too: what is wrong shows before a folder is made.

    Raises InputError.
    """
    arguments.check()
    build_network(arguments.arch, CLASSES)  # an unknown one shows before a data set is fetched
    dataset = _load(arguments)
    check_network(arguments, dataset)
    return dataset


def check_network(arguments: Arguments, dataset: Dataset) -> None:
    """Raise InputError for a network, or weights, that a run on this data set could not work with."""
    model = network_with_weights(arguments, dataset.classes)
    try:
        ConvSimPenalty(model)
    except InputError as error:
        raise InputError(f"--arch {arguments.arch}: {error}") from error
    _try(model, dataset.limited(arguments.limit_train, arguments.limit_test), arguments)


def open_run(folder: Path, epochs: int | None = None) -> Run:
    """Open a run's folder to go on with it, to more epochs where given.

    Raises InputError for a folder that is not a run, and for arguments that this version does not know.
    """
    path = folder / "args.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run's folder (no readable args.json)") from error
    arguments = make_arguments(values, path)
    return Run(folder, arguments if epochs is None else replace(arguments, epochs=epochs))


def make_arguments(values: Any, path: Path) -> Arguments:
    """Return arguments from what an args.json holds. Raises InputError, naming the file, for a key or a value it has
    not.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected the arguments of a run, by name")
    kinds = get_type_hints(Arguments)
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{path}: unknown arguments {name}: {did_you_mean(name, kinds)}")
        allowed = _allowed(kinds[name])
        if not (type(value) in allowed or value in [choice for choice in allowed if isinstance(choice, str)]):
            said = ", ".join("nothing" if a is NoneType else getattr(a, "__name__", str(a)) for a in allowed)
            raise InputError(f"{path}: {name} = {value!r}, expected {said}")
    return Arguments(**values)


def _allowed(kind: Any) -> list[Any]:
    """The types that a value may have, or the strings that it may be."""
    if kind is float:
        return [float, int]
    return list(get_args(kind)) or [kind]


def execute(
    run: Run, listener: Listener | None = None, dataset: Dataset | None = None, processes: Processes = ALONE
) -> dict[str, Any]:
    """Train a run to its number of epochs, from its last whole epoch where it has any, and return its summary.

    Of several processes the leading one alone touches the folder; the others return an empty summary. Raises
    DivergedError (the last good checkpoint is kept), InputError for a `state.pt` that is torn or another run's, and
    BusyError for a run that another process is working on.
    """
    listener = listener or Silence()
    arguments = run.arguments
    arguments.check()
    if arguments.processes != processes.size:
        raise InputError(
            f"{run.folder}: is trained by {arguments.processes} processes, these are {processes.size}; start as many"
        )
    if arguments.deterministic:
        be_deterministic()
    with ExitStack() as held:
        processes.led(lambda: held.enter_context(_locked(run.folder)))
        data = dataset or _load(arguments)
        data = data.limited(arguments.limit_train, arguments.limit_test)
        state = processes.led(lambda: _read_state(run))
        trainer, progress = _resume(run, data, state, processes) if state else _start(run, data, listener, processes)
        if processes.leads and open_run(run.folder).arguments != arguments:
            write_json(run.folder / "args.json", asdict(arguments))
        if processes.leads and trainer.epoch < arguments.epochs:
            (run.folder / "summary.json").unlink(missing_ok=True)  # a summary stands for a finished run
        while trainer.epoch < arguments.epochs:
            listener.phase(f"epoch {trainer.epoch + 1}/{arguments.epochs}", trainer.steps)
            row = trainer.run_epoch(listener.advance)
            progress["history"].append(row)
            _save(run, trainer, progress)
            listener.row(row)
        if not processes.leads:
            return {}
        summary = _summary(trainer, progress)
        write_json(run.folder / "summary.json", summary)
    return summary


def read_results(folder: Path) -> list[Row]:
    """Return a run's `results.csv` as rows of numbers. Raises InputError where there is none."""
    try:
        with (folder / "results.csv").open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are {reader.fieldnames}")
            return [{key: int(row[key]) if key == "epoch" else float(row[key]) for key in COLUMNS} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{folder}: not a run's folder (no readable results.csv: {error})") from error


def _load(arguments: Arguments) -> Dataset:
    side = arguments.image_size or usual_side(arguments.arch)
    mean, std = parse_channels("--mean", arguments.mean), parse_channels("--std", arguments.std)
    return load_dataset(arguments.dataset, Path(arguments.data_dir), side, mean, std)


def _try(model: nn.Module, dataset: Dataset, arguments: Arguments) -> None:
    """Raise InputError for a network that cannot classify the images, or not train on the last batch."""
    images = dataset.normalise(dataset.test.images[:1])
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # whatever a network asserts or runs into
        raise InputError(
            f"--arch {arguments.arch}: does not run on images {list(images.shape)} of {arguments.dataset} "
            f"({' '.join(str(error).split())[:160]})"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < dataset.classes:
        gives = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"--arch {arguments.arch}: gives {gives} for one image, expected [1, {dataset.classes}] logits, "
            f"for the classes of {arguments.dataset}"
        )
    last = len(dataset.train) % arguments.batch_size or arguments.batch_size
    if last // arguments.processes <= 1:
        try:
            with torch.no_grad():
                model.train()(images)
        except ValueError as error:  # batch normalisation of a single value
            raise InputError(
                f"--batch-size {arguments.batch_size}: leaves a process a batch of one image at the end of "
                f"{len(dataset.train)}, on which {arguments.arch} cannot train ({error})"
            ) from error


def network_with_weights(arguments: Arguments, classes: int) -> nn.Module:
    """Return the fresh network of a run, with the tensors of its `weights` file where it names one."""
    model = build_network(arguments.arch, classes, arguments.seed)
    if arguments.weights:
        checkpoint = open_checkpoint(Path(arguments.weights))
        load_weights(model, checkpoint, arguments.arch)
        for line in (checkpoint.note or "").splitlines():
            warnings.warn(line, stacklevel=2)
    return model


def sample_maps(model: nn.Module, dataset: Dataset, device: torch.device) -> dict[str, float | None]:
    """Return `fm_cos` per layer on the first test images."""
    images = dataset.normalise(dataset.test.images[:FEATURE_MAP_IMAGES].to(device))
    kernels = module_kernels(model).kernels
    return {name: maps.result()["fm_cos"] for name, maps in feature_maps(model, kernels, [images]).items()}


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def _first_free(arguments: Arguments, run_dir: Path, names: Iterable[str]) -> Run | None:
    """Make the first folder of these names that is not there: whoever makes it has it to itself."""
    for name in names:
        folder = run_dir / name
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        write_json(folder / "args.json", asdict(arguments))
        return Run(folder, arguments)
    return None


def _readable_run(path: Path) -> Run | None:
    """The run of an args.json, or None for one of another version or one just being written."""
    try:
        return open_run(path.parent)
    except InputError:
        return None


def _fits(run: Run, wanted: Arguments) -> bool:
    if replace(run.arguments, epochs=wanted.epochs, data_dir=wanted.data_dir) != wanted:
        return False
    return run.arguments.epochs <= wanted.epochs or epochs_done(run) >= wanted.epochs


def _start(run: Run, data: Dataset, listener: Listener, processes: Processes) -> tuple[Trainer, dict[str, Any]]:
    arguments, device = run.arguments, _device(run, processes)
    model = network_with_weights(arguments, data.classes).to(device)
    torch.manual_seed(arguments.seed + processes.rank)  # the leader's is a single process's
    steps = preparation_steps(model, arguments)
    if steps:  # the others take its weights
        listener.phase("init", steps)
        processes.led(lambda: prepare_(model, arguments, listener.advance))
    trainer = Trainer(model, data, arguments, device, processes)
    maps = sample_maps(model, data, device) if processes.leads else {}
    progress: dict[str, Any] = {"history": [], "fm_cos_start": maps}
    _save(run, trainer, progress)
    return trainer, progress


def _resume(run: Run, data: Dataset, state: dict[str, Any], processes: Processes) -> tuple[Trainer, dict[str, Any]]:
    arguments, device = run.arguments, _device(run, processes)
    model = build_network(arguments.arch, data.classes, arguments.seed)
    trainer = Trainer(model, data, arguments, device, processes)
    trainer.load_state(state["trainer"])
    if processes.leads:
        _write_results(run.folder, state["progress"]["history"])
    return trainer, state["progress"]


def _device(run: Run, processes: Processes) -> torch.device:
    """This process's device: of several on CUDA, the one that it has taken."""
    device = torch.device(run.arguments.device)
    return torch.device("cuda", torch.cuda.current_device()) if processes.size > 1 and device.type == "cuda" else device


def _save(run: Run, trainer: Trainer, progress: dict[str, Any]) -> None:
    state = {"arguments": asdict(run.arguments), "progress": progress, "trainer": trainer.state()}
    trainer.processes.led(lambda: _write(run, trainer, progress, state))


def _write(run: Run, trainer: Trainer, progress: dict[str, Any], state: dict[str, Any]) -> None:
    history: list[Row] = progress["history"]
    record = {
        "convsim.epoch": str(trainer.epoch),
        "convsim.mode": run.arguments.mode,
        "convsim.arch": run.arguments.arch,
    }
    weights = trainer.model.state_dict()
    save_state_dict(weights, run.folder / "last.safetensors", record)
    if history and history[-1]["test_accuracy"] > max((row["test_accuracy"] for row in history[:-1]), default=-1.0):
        save_state_dict(weights, run.folder / "best.safetensors", record)
    _write_results(run.folder, history)
    replace_file(run.folder / "state.pt", lambda file: write_pickle(file, state))


def _read_state(run: Run) -> dict[str, Any] | None:
    path = run.folder / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        former = {**asdict(Arguments()), **state["arguments"]}
        done = int(state["trainer"]["epoch"])
    except Exception as error:  # whatever a torn pickle raises
        raise InputError(
            f"{path}: damaged ({type(error).__name__}); the run cannot go on, its last.safetensors may be whole; "
            f"remove {run.folder} to train it anew"
        ) from error
    for key, value in asdict(run.arguments).items():
        if key != "epochs" and former[key] != value:
            raise InputError(f"{path}: belongs to a run with {key} = {former[key]!r}, args.json says {value!r}")
    if run.arguments.epochs < done:
        raise InputError(f"{run.folder}: has done {done} epochs, --epochs {run.arguments.epochs} is fewer")
    return state


def _summary(trainer: Trainer, progress: dict[str, Any]) -> dict[str, Any]:
    history: list[Row] = progress["history"]
    best = max(history, key=lambda row: row["test_accuracy"])
    seconds = sum(row["seconds"] for row in history)
    return {
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "last_test_accuracy": history[-1]["test_accuracy"],
        "mean_last5_test_accuracy": mean(row["test_accuracy"] for row in history[-5:]),
        "last_train_accuracy": history[-1]["train_accuracy"],
        "cs": history[-1]["cs"],
        "fm_cos": {
            "start": progress["fm_cos_start"],
            "end": sample_maps(trainer.model, trainer.dataset, trainer.device),
        },
        "parameters": count_parameters(trainer.model),
        "epochs": len(history),
        "seconds": seconds,
        "images_per_second": len(history) * len(trainer.dataset.train) / seconds,
    }


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder itself locked: the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{folder}: another process is working on this run") from None
        yield
    finally:
        os.close(descriptor)


def _write_results(folder: Path, history: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write_text(folder / "results.csv", text.getvalue())


def write_json(path: Path, document: Any) -> None:
    """Replace a file by a JSON document."""
    _write_text(path, json.dumps(document, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    data = text.encode()
    replace_file(path, lambda file: file.write(data))
