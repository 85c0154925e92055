"""What convsim does and takes on a GPU: stages in two calls of at most nine minutes, from a checkout as it is.

    python tests/benchmarks/gpu.py --call a --output found             # tests, parity, times and memory
    python tests/benchmarks/gpu.py --call b --output found --data-dir DATA --run-dir /dev/shm/runs     # trainings
    python tests/benchmarks/gpu.py --stage epochs --output found       # one stage; its former rows are replaced
    python tests/benchmarks/gpu.py --device cpu --smoke                # everything, tiny: does it run?

Each row is printed and saved in OUTPUT/results.json as soon as it is known. A row or a stage that fails or takes too
long costs itself alone, and says so in its place; a stage runs in a process of its own, because a failed kernel
spoils CUDA for its process. SIGTERM and Ctrl-C keep what is there. OUTPUT also holds `pytest.txt`, `junit.xml`,
`parity.json`, and of the trainings a `.tar.gz` per seed. Only whole seeds can be compared, so Table 5 trains the arms
of one seed at once, each in a process of its own; called again with the same RUN_DIR, it continues.

The tests by themselves, wherever torch and pytest are:

    python -m pytest tests/test_gpu.py -n 0 -p no:benchmark -p no:cacheprovider -W default

Times do not contain starting a process and CUDA; a step is timed over many, after those that record and compile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from records import ROOT, UNCHECKED, environment, in_one_line, save, time_limit, write_cifar10

# torch, and what imports it, is imported where it is used: the process that watches over the stages needs none of it.

Row = tuple[str, float | str, str, str]  # what, found, unit, aim
Part = tuple[str, float, Callable[[], Iterator[Row]]]  # its name, a limit in seconds, and what yields its rows

BYTES = 4 * 10  # of an iteration for each float32 value: K twice for the gradient, which is written, and 7 in Adam
RECIPES: dict[str, tuple[dict[str, Any], str]] = {  # the one that compiles comes last: it may take all the time left
    "fp32": ({}, "≤ 45"),
    "tf32": ({"precision": "tf32"}, "≤ 25"),
    "bf16": ({"precision": "bf16"}, "≤ 15"),
    "bf16 compiled": ({"precision": "bf16", "compile": True}, "≤ 10"),
}
ARMS = ("baseline", "init", "reg", "rescale", "init-norm")  # all five at once
SEEDS = 3  # one after the other
MODERN = "--lr 0.1 --momentum 0.9 --nesterov --weight-decay 5e-4 --schedule cosine --augment flip-crop"
GRACE = 8.0  # seconds for a stage that is told to stop
POLL = 0.2  # seconds between looks at processes


class Stopped(BaseException):
    """SIGTERM or Ctrl-C has come. It is no Exception, for that is what costs a row alone."""


@dataclass(frozen=True)
class Stage:
    """Some rows. call: which of the two calls it belongs to; limit: seconds that it may take."""

    call: str
    limit: float
    parts: Callable[[argparse.Namespace], Iterator[Part]]

    @property
    def name(self) -> str:
        return self.parts.__name__


def tests(given: argparse.Namespace) -> Iterator[Part]:
    """The tests that need a GPU. Warnings of drivers and compilers are no failures here."""

    def run() -> Iterator[Row]:
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-n", "0", "-v"]
        command += ["-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default"]
        command += [f"--junitxml={(given.output / 'junit.xml').resolve()}"]
        with (given.output / "pytest.txt").open("w+") as kept:
            how = {"stdout": kept, "stderr": subprocess.STDOUT, "cwd": ROOT}
            settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
            done = subprocess.run(command, check=False, env=environment(**settings), **how)
            kept.seek(0)
            last = kept.read().strip().rpartition("\n")[2].strip("= ")
        yield "pytest -m gpu", last if not done.returncode else f"failed with {done.returncode}: {last}", "", "passed"

    yield "pytest -m gpu", given.limit, run


def parity(given: argparse.Namespace) -> Iterator[Part]:
    """Every public name, command and objective gives on the device what it gives on the CPU."""

    def run() -> Iterator[Row]:
        path = (given.output / "parity.json").resolve()
        command = [sys.executable, str(Path(__file__).with_name("parity.py")), "--device", str(given.device)]
        command += ["--output", str(path), "--patience", "240" if given.smoke else "60"]
        done = subprocess.run(command, check=False, env=environment())
        rows = json.loads(path.read_text())["rows"]
        failed = [row["name"] for row in rows if row["outcome"] not in ("ok", "skipped")]
        yield "parity with the CPU: entries", float(len(rows)), "", ""
        yield "parity with the CPU: failed", ", ".join(failed) or "none", f"exit code {done.returncode}", "none"

    yield "parity", given.limit, run


def init(given: argparse.Namespace) -> Iterator[Part]:
    """Algorithm 1 over whole networks, and the share of the memory's bandwidth that its iterations take."""
    networks = {"cnn:8": ""} if given.smoke else {"resnet18": "≤ 0.3", "torchvision:resnet50": "≤ 0.6"}
    for name, aim in networks.items():
        for preserve_norm in (False, True):
            yield f"init {name}", 30, partial(_init, given, name, preserve_norm, aim)


def _init(given: argparse.Namespace, name: str, preserve_norm: bool, aim: str) -> Iterator[Row]:
    from convsim_cli.minimize import Minimization, minimize_kernels

    iterations = 10 if given.smoke else 500
    how = Minimization(iterations, preserve_norm=preserve_norm)
    layers = _layers(given, name, how)
    list(minimize_kernels(layers, Minimization(5, preserve_norm=preserve_norm)))  # what is created once
    seconds = _seconds(lambda: list(minimize_kernels(layers, how)), given.device)
    moved = iterations * BYTES * sum(weight.numel() for _, weight in layers)
    what = f"init {name}, {iterations} iterations, {'norm-preserving' if preserve_norm else 'raw'}"
    yield what, seconds, "s", aim
    yield f"{what}: at least", moved / seconds / 1e9, "GB/s", ""


def penalty(given: argparse.Namespace) -> Iterator[Part]:
    """A step with the penalty over one without."""
    for case in _cases(given):
        yield f"reg / baseline step, {case[0]}", 60, partial(_penalty, given, *case)


def _penalty(given: argparse.Namespace, network: str, batch: int, precision: str, aim: str) -> Iterator[Row]:
    from timing import interleave

    from convsim_cli.precision import full_precision

    runs = {}
    for mode in ("baseline", "reg"):
        trainer = _trainer(given, network, 8 * batch, mode=mode, batch_size=batch, precision=precision)
        runs[mode] = partial(trainer.train_batches, None)
    with full_precision(given.device):  # as an epoch enters it
        found = interleave(runs, given.device, 3 if given.smoke else 21)
    what = f"{network}, batch {batch}, {precision}"
    yield f"reg / baseline step, {what}", found["reg"].ratio, "", aim
    yield f"baseline step, {what}", 1e3 * found["baseline"].seconds / 8, "ms", ""


def epochs(given: argparse.Namespace) -> Iterator[Part]:
    """100 epochs of CNN1, from the median of three."""
    for name in RECIPES:
        if not (given.smoke and "compiled" in name):
            yield f"100 epochs, {name}", 60, partial(_epochs, given, name)


def _epochs(given: argparse.Namespace, name: str) -> Iterator[Row]:
    arguments, aim = RECIPES[name]
    network, train, test = ("cnn:8", 64, 32) if given.smoke else ("cnn1", 50_000, 10_000)
    trainer = _trainer(given, network, train, test, **arguments)
    start = time.perf_counter()
    trainer.run_epoch()  # compiles and records
    yield f"first epoch of {network}, {name}", time.perf_counter() - start, "s", ""
    seconds = sorted(trainer.run_epoch()["seconds"] for _ in range(3))[1]
    yield f"100 epochs of {network}, {name}", 100 * seconds, "s", aim


def memory(given: argparse.Namespace) -> Iterator[Part]:
    """The most memory that is held at once, each row by itself."""
    for network in ("cnn:8",) if given.smoke else ("resnet18", "torchvision:resnet50"):
        yield f"peak memory, init {network}", 20, partial(_memory_of_init, given, network)
    for network, batch, precision, _ in _cases(given):
        for mode in ("baseline", "reg"):
            yield f"peak memory, {mode} {network}", 20, partial(_memory_of_step, given, network, batch, precision, mode)


def _memory_of_init(given: argparse.Namespace, network: str) -> Iterator[Row]:
    from convsim_cli.minimize import Minimization, minimize_kernels

    how = Minimization(10)
    layers = _layers(given, network, how)
    held = 4 * sum(weight.numel() for _, weight in layers)
    peak = _peak(lambda: list(minimize_kernels(layers, how)), given)
    yield f"peak memory, init {network}", peak, "MB", ""
    if not isinstance(peak, str):
        yield f"peak memory, init {network}, over the kernels' own", peak * 1e6 / held, "", ""


def _memory_of_step(given: argparse.Namespace, network: str, batch: int, precision: str, mode: str) -> Iterator[Row]:
    trainer = _trainer(given, network, 2 * batch, mode=mode, batch_size=batch, precision=precision)
    peak = _peak(partial(trainer.train_batches, None), given)
    yield f"peak memory, {mode}, {network}, batch {batch}, {precision}", peak, "MB", ""


def table5(given: argparse.Namespace) -> Iterator[Part]:
    """Table 5 for CNN1 in full length: seed by seed, the arms at once."""
    finished: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(1 if given.smoke else SEEDS):
        yield f"table5, seed {seed}", given.limit, partial(_seed, given, seed, finished)

    def means() -> Iterator[Row]:
        for arm, found in finished.items():
            spread = f"± {stdev(found):.2f} %" if len(found) > 1 else "%"
            if found:
                yield f"table5, {arm}, {len(found)} seeds: best test accuracy", mean(found), spread, ""

    yield "table5, means", 10, means


def _seed(given: argparse.Namespace, seed: int, finished: dict[str, list[float]]) -> Iterator[Row]:
    size = "--epochs 1 --limit-train 64 --limit-test 20" if given.smoke else ""
    common = f"reproduce table5 --archs cnn1 --seeds 1 --seed {seed} --precision tf32 {size}".split()
    arms = ("baseline", "reg") if given.smoke else ARMS
    started = {f"cnn1-{arm}-s{seed}": _convsim(given, *common, "--arms", arm) for arm in arms}
    for name, document in _ended(given, started, f"table5-s{seed}"):
        row = document["rows"][0]
        measured, paper = row["measured"], row["published"]["test_accuracy"]
        finished[row["arm"]].append(measured["best_test_accuracy"])
        what = f"table5, {name}, {measured['epochs']} epochs"
        yield f"{what}: best test accuracy", measured["best_test_accuracy"], "%", f"{paper} published" if paper else ""
        yield f"{what}: last test accuracy", measured["last_test_accuracy"], "%", ""
        yield f"{what}: time beside the other arms", measured["seconds"], "s", ""


def recipe(given: argparse.Namespace) -> Iterator[Part]:
    """ResNet-18 with a modern recipe."""

    def run() -> Iterator[Row]:
        size = "--arch cnn:8 --epochs 1 --limit-train 64 --limit-test 20"
        size = size if given.smoke else "--arch resnet18 --epochs 30 --precision bf16"
        started = {"modern": _convsim(given, "train", "--name", "modern", *size.split(), *MODERN.split())}
        for _, document in _ended(given, started, "modern"):
            found = document["runs"][0]
            what = f"{found['arch']}, modern recipe, {found['epochs']} epochs"
            yield f"{what}: best test accuracy", found["best_test_accuracy"], "%", ""
            yield f"{what}: last test accuracy", found["last_test_accuracy"], "%", ""
            yield f"{what}: time", found["seconds"], "s", ""

    yield "modern recipe", given.limit, run


STAGES = (
    Stage("a", 110, tests),
    Stage("a", 110, parity),
    Stage("a", 70, init),
    Stage("a", 70, penalty),
    Stage("a", 120, epochs),
    Stage("a", 50, memory),
    Stage("b", 380, table5),
    Stage("b", 150, recipe),
)


def _cases(given: argparse.Namespace) -> list[tuple[str, int, str, str]]:
    """What steps are taken with: network, batch, precision, and the aim of reg / baseline."""
    if given.smoke:
        return [("cnn:8", 16, "fp32", "")]
    return [("cnn1", 512, "fp32", "≤ 1.03"), ("resnet18", 512, "bf16", "≤ 1.05")]


def _layers(given: argparse.Namespace, name: str, how: Any) -> list[Any]:
    from convsim_cli.kernels import module_kernels, weight_of
    from convsim_cli.networks.architectures import build_network

    model = build_network(name).to(given.device)
    return [(kernel, weight_of(model, kernel).detach()) for kernel in how.select(module_kernels(model)).kernels]


def _trainer(given: argparse.Namespace, network: str, train: int, test: int | None = None, **arguments: Any) -> Any:
    from training import noise

    from convsim_cli.networks.architectures import build_network
    from convsim_cli.training.config import Arguments
    from convsim_cli.training.trainer import Trainer, choose_algorithms

    choose_algorithms(deterministic=False)
    return Trainer(build_network(network), noise(train, test), Arguments(**arguments), given.device)


def _seconds(function: Callable[[], object], device: Any) -> float:
    from convsim_cli.device import synchronize

    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _peak(function: Callable[[], object], given: argparse.Namespace) -> float | str:
    """The most megabytes that are allocated at once while a function runs, what was there before included."""
    import torch

    if given.device.type != "cuda":
        function()
        return f"skipped: not counted on {given.device}"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(given.device)
    function()
    torch.cuda.synchronize(given.device)
    return torch.cuda.max_memory_allocated(given.device) / 1e6


def _convsim(given: argparse.Namespace, *arguments: str) -> subprocess.Popen[str]:
    """Start a command on the device and the data, whose result is one JSON document."""
    start = ["-c", UNCHECKED] if given.unchecked else ["-m", "convsim_cli"]
    where = ["--data-dir", str(given.data_dir), "--run-dir", str(given.run_dir), "--device", str(given.device)]
    command = [sys.executable, *start, *arguments, *where, "--json", "-q"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(OMP_NUM_THREADS="2"))


def _ended(
    given: argparse.Namespace, started: dict[str, subprocess.Popen[str]], archive: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield processes, by the name of their run, with their documents as they end, and pack their runs at the end.

    Raises RuntimeError, once all others have ended, for those that failed. Where it is stopped, the exception says how
    far the others have come.
    """
    left, failed = dict(started), []
    try:
        while left:
            for name in [name for name, process in left.items() if process.poll() is not None]:
                process = left.pop(name)
                document, _ = process.communicate()
                if process.returncode:
                    failed.append(f"{name} with {process.returncode}")
                else:
                    yield name, json.loads(document)
            time.sleep(POLL)
    except (TimeoutError, Stopped) as error:
        error.args = ("; ".join([*map(str, error.args), *(_progress(given, name) for name in left)]),)
        raise
    finally:
        for process in left.values():
            process.terminate()
        for process in left.values():
            process.communicate()
        _pack(given, list(started), given.output / f"{archive}.tar.gz")
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; see what they printed")


def _progress(given: argparse.Namespace, name: str) -> str:
    results = given.run_dir / name / "results.csv"
    rows = results.read_text().splitlines()[1:] if results.exists() else []
    return f"{name} after {len(rows)} epochs" + (f": {rows[-1]}" if rows else "")


def _pack(given: argparse.Namespace, names: list[str], path: Path) -> None:
    """Keep what is small of the runs: neither their states nor the weights of a large network."""
    with tarfile.open(path, "w:gz") as packed:
        for name in names:
            for file in sorted((given.run_dir / name).glob("*")):
                if file.name in ("args.json", "results.csv", "summary.json") or (
                    file.name == "last.safetensors" and file.stat().st_size < 1 << 20
                ):
                    packed.add(file, f"{name}/{file.name}")


def main(stages: tuple[Stage, ...] = STAGES, arguments: list[str] | None = None) -> int:
    """Run stages one after the other, each in a process of its own, and return the exit code."""
    given = _arguments(stages, arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    print("stage\twhat\tfound\tunit\taim", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if given.smoke:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors this small are quicker without threads
            given.run_dir = Path(folder) / "runs"
            given.unchecked = given.data_dir is None
            if given.unchecked and any(stage.call == "b" for stage in stages if stage.name in given.stage):
                write_cifar10(Path(folder))
                given.data_dir = Path(folder)
        given.data_dir = given.data_dir or Path("data")
        try:
            for stage in stages:
                if stage.name in given.stage:
                    _watch(stage, given)
        except Stopped:
            return 143
    return 0


def _watch(stage: Stage, given: argparse.Namespace) -> None:
    """Run a stage in a process of its own, and end it when its time is over."""
    limit = given.limit or stage.limit
    own = argparse.Namespace(**{**vars(given), "limit": limit})
    record(given.output, stage.name, None)
    process = get_context("spawn").Process(target=run, args=(stage, own))
    process.start()
    try:
        process.join(limit)
        failure = f"stopped after {limit:.0f} s" if process.is_alive() else ""
        failure = failure or (f"its process ended with {process.exitcode}" if process.exitcode else "")
        if failure:
            _end(process)
            record(given.output, stage.name, (stage.name, f"failed: {failure}", "", ""))
    except Stopped:
        _end(process)
        record(given.output, stage.name, (stage.name, "failed: stopped by a signal", "", ""))
        raise


def _end(process: Any) -> None:
    """End a stage and all that it has started: first by a request, so that it can save and report."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # what a stage has started can outlive it
        except ProcessLookupError:  # all of them have ended, or it has just been started
            process.kill()
        process.join(GRACE)


def run(stage: Stage, given: argparse.Namespace) -> None:
    """Carry out a stage, in a process and a process group of its own: every part in its own `try`."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _stop)
    from convsim_cli.device import resolve_device

    given.device = resolve_device(given.device)
    record(given.output, stage.name, None, given.device)
    try:
        for name, limit, rows in stage.parts(given):
            try:
                with time_limit(limit):
                    for row in rows():
                        record(given.output, stage.name, row)
            except Exception as error:
                record(given.output, stage.name, (name, f"failed: {in_one_line(error)}", "", ""))
    except Exception as error:
        record(given.output, stage.name, (stage.name, f"failed: {in_one_line(error)}", "", ""))
    except Stopped as error:
        if str(error):
            record(given.output, stage.name, (stage.name, f"failed: {error}", "", ""))
        sys.exit(143)


def record(output: Path, stage: str, row: Row | None, device: Any = None) -> None:
    """Print a row and add it to a stage's; without one, begin the stage anew, and say on which device."""
    path = output / "results.json"
    document = json.loads(path.read_text()) if path.exists() else {"stages": {}}
    if device is not None:
        import torch

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        document |= {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if row is None:
        document["stages"][stage] = []
    else:
        what, value, unit, aim = row
        document["stages"][stage].append(row)
        found = f"{value:.4g}" if isinstance(value, float) else value
        print(stage, what, found, unit, aim, sep="\t", flush=True)
    save(path, document)


def _stop(_: int, __: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # `timeout` sends the first one twice
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def _arguments(stages: tuple[Stage, ...], arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages]
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="the folder to save rows and logs in")
    parser.add_argument("--call", choices=sorted({stage.call for stage in stages}), help="only the stages of this call")
    parser.add_argument("--stage", choices=names, action="append", help="only this stage; can be repeated")
    parser.add_argument("--limit", type=float, help="seconds for each stage, in place of its own limit")
    parser.add_argument("--data-dir", type=Path, help="the folder of CIFAR-10; data unless given, noise with --smoke")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are kept, and continued")
    parser.add_argument("--device", default="cuda", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--smoke", action="store_true", help="tiny networks and runs, to see that everything works")
    given = parser.parse_args(arguments)
    given.stage = given.stage or [stage.name for stage in stages if given.call in (None, stage.call)]
    given.unchecked = False
    return given


if __name__ == "__main__":
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_, _stop)
    sys.exit(main())
