"""What convsim takes on a GPU: one table, in stages of minutes that can be resumed.

    python tests/benchmarks/gpu.py --output gpu.json            # all stages that are not in the file yet
    python tests/benchmarks/gpu.py --output gpu.json --stage init
    python tests/benchmarks/gpu.py --output gpu.json --stage table5 --data-dir data   # again, until it is finished
    python tests/benchmarks/gpu.py --device cpu --smoke         # the plumbing alone, in seconds

A stage takes well under nine minutes and is saved at its end; the next call runs those that are left. `table5` takes
longer: it stops after eight minutes, and the next call resumes it. Times do not contain starting a process and CUDA; a
step is timed over many, after those that record and compile.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import arguments_of_device, interleave
from training import noise

from convsim_cli.descent import Minimization
from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.machine.device import synchronize
from convsim_cli.minimize import minimize_kernels
from convsim_cli.networks.names import build_network
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.trainer import Trainer, choose_algorithms

Row = tuple[str, float | str, str, str]  # what, found, unit, aim
BYTES = 4 * 10  # of an iteration for each float32 value: K twice for the gradient, which is written, and 7 in Adam
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "bf16 + compile": {"precision": "bf16", "compile": True},
}
ARMS = "baseline,init,reg,rescale,init-norm"
PATIENCE = 480.0  # seconds that `table5` takes in one call
EPOCHS_AIM = {"fp32": "≤ 45", "tf32": "≤ 25", "bf16": "≤ 15", "bf16 + compile": "≤ 10"}


def tests(_: argparse.Namespace) -> Iterator[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0", "tests/machine/test_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    yield "pytest -m gpu", done.stdout.strip().rpartition("\n")[2], "", "passed"


def init(given: argparse.Namespace) -> Iterator[Row]:
    """Algorithm 1 over whole networks, and the share of the memory's bandwidth that its iterations take."""
    iterations = 10 if given.smoke else 500
    networks = {"cnn:8": ""} if given.smoke else {"resnet18": "≤ 0.3", "torchvision:resnet50": "≤ 0.6"}
    for name, aim in networks.items():
        for preserve_norm in (False, True):
            how = Minimization(iterations, preserve_norm=preserve_norm)
            model = build_network(name).to(given.device)
            kernels = how.select(module_kernels(model)).kernels
            layers = [(kernel, weight_of(model, kernel)) for kernel in kernels]
            list(minimize_kernels(layers, Minimization(5, preserve_norm=preserve_norm)))  # what is created once
            seconds = _seconds(lambda layers=layers, how=how: list(minimize_kernels(layers, how)), given.device)
            moved = iterations * BYTES * sum(weight.numel() for _, weight in layers)
            what = f"init {name}, {iterations} iterations, {how.label}"
            yield what, seconds, "s", aim
            yield f"{what}: at least", moved / seconds / 1e9, "GB/s", ""


def epochs(given: argparse.Namespace) -> Iterator[Row]:
    """100 epochs of CNN1, from the median of a few."""
    choose_algorithms(deterministic=False)
    network, count = ("cnn:8", 64) if given.smoke else ("cnn1", 50_000)
    for name, recipe in RECIPES.items():
        if given.smoke and "compile" in recipe:
            continue
        trainer = Trainer(build_network(network), noise(count), Arguments(**recipe), given.device)
        trainer.run_epoch()  # compiles and records
        seconds = sorted(trainer.run_epoch()["seconds"] for _ in range(3))[1]
        yield f"100 epochs of {network}, {name}", 100 * seconds, "s", EPOCHS_AIM[name]


def penalty(given: argparse.Namespace) -> Iterator[Row]:
    """A step with the penalty over one without, and the memory that it takes."""
    choose_algorithms(deterministic=False)
    cases = [("cnn:8", 16, {}, "")] if given.smoke else []
    if not given.smoke:
        cases = [("cnn1", 512, {}, "≤ 1.03"), ("resnet18", 512, {"precision": "bf16"}, "≤ 1.05")]
    for network, batch, recipe, aim in cases:
        data = noise(8 * batch)
        runs: dict[str, Callable[[], object]] = {}
        for mode in ("baseline", "reg"):
            trainer = Trainer(
                build_network(network), data, Arguments(mode=mode, batch_size=batch, **recipe), given.device
            )
            runs[mode] = lambda trainer=trainer: trainer._train(None)
        found = interleave(runs, given.device, 3 if given.smoke else 21)
        what = f"{network}, batch {batch}, {recipe.get('precision', 'fp32')}"
        yield f"reg / baseline step, {what}", found["reg"].ratio, "", aim
        yield f"baseline step, {what}", 1e3 * found["baseline"].seconds / 8, "ms", ""
        if given.device.type == "cuda":
            yield f"peak memory, both, {what}", torch.cuda.max_memory_allocated(given.device) / 1e9, "GB", ""


def table5(given: argparse.Namespace) -> Iterator[Row]:
    """Table 5 in full length, with three seeds: runs that are finished count, and unfinished ones go on."""
    size = "--archs cnn1 --seeds 1 --epochs 1 --limit-train 64 --limit-test 64" if given.smoke else "--seeds 3"
    command = [sys.executable, "-m", "convsim_cli", "reproduce", "table5", "--arms", ARMS, *size.split()]
    where = ["--data-dir", str(given.data_dir), "--run-dir", str(given.run_dir), "--device", str(given.device)]
    with subprocess.Popen([*command, *where, "--json", "-q"], stdout=subprocess.PIPE, text=True) as process:
        try:
            document, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise UnfinishedError(f"table5: stopped after {PATIENCE:.0f} s; the same command resumes it") from error
    if process.returncode:
        raise UnfinishedError("table5: failed, see above")
    for row in json.loads(document)["rows"]:
        measured, paper = row["measured"], row["published"]["test_accuracy"]
        what = f"{row['arch']} {row['arm']}, {measured['seeds']} seeds, {measured['epochs']} epochs, test accuracy"
        yield f"{what}: best", measured["best_test_accuracy"], "%", f"{paper} in the paper" if paper else ""
        yield f"{what}: standard deviation", measured["best_test_accuracy_std"] or "", "%", ""
        yield f"{what}: last", measured["last_test_accuracy"], "%", ""


STAGES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    stage.__name__: stage for stage in (tests, init, epochs, penalty, table5)
}


class UnfinishedError(Exception):
    """A stage was stopped before its end: it is not saved, and the next call resumes it."""


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where stages are saved, and resumed from")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one, again if it is saved")
    parser.add_argument("--data-dir", type=Path, default="data", help="where CIFAR-10 is, for table5")
    parser.add_argument("--run-dir", type=Path, default="runs", help="where the runs of table5 are kept")
    parser.add_argument("--smoke", action="store_true", help="tiny networks: to see that it runs")
    return arguments_of_device(parser, default="cuda")


def _load(path: Path | None) -> dict[str, list[Row]]:
    return json.loads(path.read_text())["stages"] if path and path.exists() else {}


def main() -> None:
    given = _arguments()
    found = _load(given.output)
    name = torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else given.device.type
    for stage in given.stage or [stage for stage in STAGES if stage not in found]:
        try:
            found[stage] = list(STAGES[stage](given))
        except UnfinishedError as error:
            print(error, file=sys.stderr)
            continue
        if given.output:
            document = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "stages": found}
            given.output.write_text(json.dumps(document, indent=2, ensure_ascii=False))
    print(f"what ({name}, torch {torch.__version__})\tfound\tunit\taim")
    for what, value, unit, aim in (row for stage in STAGES if stage in found for row in found[stage]):
        print(what, f"{value:.4g}" if isinstance(value, float) else value, unit, aim, sep="\t")


if __name__ == "__main__":
    main()
