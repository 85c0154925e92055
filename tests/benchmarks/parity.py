"""Every public name, command, mode and objective: what it gives on a device against what it gives on the CPU.

    python tests/benchmarks/parity.py --device cuda --output parity.json
    python tests/benchmarks/parity.py --device cpu                       # is the list itself in order?
    python tests/benchmarks/parity.py --device cuda --only 'train*'

A line for each entry, printed and saved as soon as it is known: name, worst relative difference, limit, outcome,
seconds. The difference of two tensors is that of their L2 norms, ‖found − expected‖ / ‖expected‖. The limit is 1e-3 in
float32 and 1e-6 in float64. An entry that fails or takes too long costs itself alone. The exit code is 1 if any failed.

To add one, write a function from a device to figures, under `@entry`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from records import environment, in_one_line, save, time_limit, write_cifar10
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

import convsim_cli as library
from convsim_cli.cli import run as run_command
from convsim_cli.closed_forms import dct_weight_, orthogonalize_weight_
from convsim_cli.device import resolve_device
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.networks.architectures import build_network
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.precision import full_precision
from convsim_cli.training.config import MODES, Arguments
from convsim_cli.training.prepare import prepare_
from convsim_cli.training.trainer import Trainer, choose_algorithms

Figures = dict[str, Any]  # by name: a tensor, a number, or None
Compute = Callable[[torch.device], Figures]
CPU = torch.device("cpu")
FLOAT32, FLOAT64 = 1e-3, 1e-6  # limits
SHAPES = ((16, 8, 3, 3), (16, 3, 7, 7), (24, 1, 15, 15), (16, 8, 1, 1), (16, 8, 5), (8, 4, 3, 3, 3))
LR = {"adam": 3e-4, "sgd": 1e-3}  # moves the kernels by 1 to 15 %, and lets rounding grow by less than ten times,
LR_OF = {("orthoreg", "sgd"): 0.1}  # but for this one, whose gradient is small
ITERATIONS = 55  # more than run before a CUDA graph is recorded, and more than between two readings of the losses
F = TypeVar("F", bound=Compute)


class SkippedError(Exception):
    """This machine cannot show it, for the reason given."""


@dataclass(frozen=True)
class Entry:
    """What is compared. limit: of the relative difference."""

    name: str
    limit: float
    compute: Compute


ENTRIES: list[Entry] = []


def entry(name: str, limit: float) -> Callable[[F], F]:
    """Add a function to the list."""

    def add(compute: F) -> F:
        ENTRIES.append(Entry(name, limit, compute))
        return compute

    return add


def kernels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Kernels as they are before training, the same on every device."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 10).to(dtype)


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build_network("cnn:8").to(device, dtype)


def convolutions(model: nn.Module) -> Figures:
    """The kernels of a network; what a bias before batch norm becomes is rounding."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim == 4}


def numbers(records: list[dict[str, Any]], prefix: str = "") -> Figures:
    """All numbers of the records of layers."""
    found: Figures = {}
    for record in records:
        for key, value in record.items():
            where = f"{prefix}{record.get('name', '')} {key}"
            if isinstance(value, dict):
                found |= numbers([value], f"{where}: ")
            elif isinstance(value, int | float | None):
                found[where] = value
    return found


@entry("library: convolutional_similarity", FLOAT64)
def _similarity(device: torch.device) -> Figures:
    found = {}
    for shape in SHAPES:
        weight = kernels(*shape, dtype=torch.float64).to(device).requires_grad_()
        value = library.convolutional_similarity(weight)
        (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
        found |= {f"{shape}": value.detach(), f"{shape} gradient": gradient.detach(), f"{shape} second": second}
    return found


@entry("library: ConvSimPenalty", FLOAT64)
def _penalty_in_float64(device: torch.device) -> Figures:
    return _penalty("cs", torch.float64, device)


def _penalty(objective: str, dtype: torch.dtype, device: torch.device) -> Figures:
    model = network(device, dtype)
    penalty = library.ConvSimPenalty(model, objective)
    value = penalty()
    value.backward()
    found = {"value": value.detach(), "logged": penalty.value()} | _gradients(model, "backward")
    for preserve_norm in (False, True):
        model.zero_grad()
        with full_precision(device):  # cuDNN takes TF32 unless told otherwise
            model(images(8).to(device, dtype)).square().mean().backward()
        found[f"ratio {preserve_norm}"] = penalty.gradient_ratio(preserve_norm)
        penalty.add_gradient_(0.5, preserve_norm)
        found |= _gradients(model, f"added {preserve_norm}")
        penalty.add_gradient_(torch.tensor(0.5, device=device), preserve_norm)
        found |= _gradients(model, f"added by a tensor {preserve_norm}")
    return found


def _gradients(model: nn.Module, which: str) -> Figures:
    named = model.named_parameters()
    return {
        f"{which} {name}": weight.grad.clone() for name, weight in named if weight.ndim == 4 and weight.grad is not None
    }


@entry("library: minimize_", FLOAT64)
def _minimize(device: torch.device) -> Figures:
    found = {}
    for preserve_norm in (False, True):
        model = network(device)
        records = library.minimize_(model, ITERATIONS, preserve_norm=preserve_norm)
        found |= {f"{key} {preserve_norm}": value for key, value in (numbers(records) | convolutions(model)).items()}
    return found


@entry("library: minimize_weight_", FLOAT64)
def _minimize_weight(device: torch.device) -> Figures:
    found = {}
    for shape, preserve_norm in product(SHAPES, (False, True)):
        if math.prod(shape[2:]) == 1 and preserve_norm:
            continue  # nothing to minimize
        weight = kernels(*shape, dtype=torch.float64).to(device)
        found[f"{shape} {preserve_norm}"] = library.minimize_weight_(
            weight, iterations=ITERATIONS, preserve_norm=preserve_norm
        )
    return found


@entry("library: orthogonalize_", FLOAT64)
def _orthogonalize(device: torch.device) -> Figures:
    model = network(device)
    return numbers(library.orthogonalize_(model)) | convolutions(model)


@entry("library: dct_", FLOAT64)
def _dct(device: torch.device) -> Figures:
    model = network(device)
    return numbers(library.dct_(model)) | convolutions(model)


@entry("library: decorrelate_", FLOAT64)
def _decorrelate(device: torch.device) -> Figures:
    model = network(device)
    return numbers(library.decorrelate_(model, images().to(device, torch.float64))) | convolutions(model)


@entry("library: TurnMonitor", FLOAT64)
def _turns(device: torch.device) -> Figures:
    model = network(device)
    turned = library.TurnMonitor(model)
    library.minimize_(model, 5, preserve_norm=True)
    turned()
    return numbers(turned.rows())


@entry("library: measure", FLOAT64)
def _measure(device: torch.device) -> Figures:
    return numbers(library.measure(network(device), images(8).to(device, torch.float64)))


@entry("library: measure_checkpoint", FLOAT32)
def _measure_checkpoint(device: torch.device) -> Figures:
    with _folder() as folder:
        save_file({"a.weight": kernels(16, 8, 3, 3), "b.weight": kernels(8, 16, 7, 7)}, folder / "m.safetensors")
        path, how = folder / "m.safetensors", {"input": "natural", "samples": 4, "device": str(device)}
        return numbers(library.measure_checkpoint(path, **how).layers)


@entry("library: init_checkpoint", FLOAT32)
def _init_checkpoint(device: torch.device) -> Figures:
    with _folder() as folder:
        path = folder / "model.safetensors"
        save_file({"a.weight": kernels(16, 8, 3, 3), "b.weight": kernels(8, 16, 7, 7).half()}, path)
        done = library.init_checkpoint(path, iterations=ITERATIONS, device=str(device))
        return numbers(done.layers) | load_file(path)


@entry("library: open_checkpoint", FLOAT64)
def _open_checkpoint(device: torch.device) -> Figures:
    """A state dict that was saved on the device is read as one of the CPU."""
    with _folder() as folder:
        path = folder / "model.pt"
        torch.save(network(device).state_dict(), path)
        checkpoint = library.open_checkpoint(path)
        return {name: checkpoint.load(name) for name, info in checkpoint.tensors.items() if len(info.shape) == 4}


def _objective_entries() -> Iterator[Entry]:
    """Each objective as a penalty, and minimized as CUDA graphs by both optimizers, stored in every type."""
    for objective in OBJECTIVES:
        yield Entry(f"penalty: {objective}", FLOAT32, partial(_penalty, objective, torch.float32))
        for optimizer in ("adam", "sgd"):
            compute = partial(_minimized, objective, optimizer)
            yield Entry(f"graphs: {objective}, {optimizer}", FLOAT32, compute)


def _minimized(objective: str, optimizer: str, device: torch.device) -> Figures:
    found: Figures = {}
    cases = ((torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, True))
    for dtype, preserve_norm in cases:
        weight = kernels(16, 8, 3, 3, dtype=dtype).to(device)
        lr = LR_OF.get((objective, optimizer), LR[optimizer])
        how = {"objective": objective, "optimizer": optimizer, "lr": lr, "preserve_norm": preserve_norm}
        library.minimize_weight_(weight, iterations=ITERATIONS, **how)  # type: ignore[arg-type]
        found[f"{dtype} {preserve_norm}"] = weight
        found[f"{dtype} {preserve_norm} cs"] = library.convolutional_similarity(weight)
    return found


@entry("closed form: orthogonal", FLOAT64)
def _orthogonal_weights(device: torch.device) -> Figures:
    shapes = ((16, 8, 3, 3), (64, 3, 3, 3), (16, 8, 1, 1), (16, 8, 5))  # the second has more filters than directions
    return {f"{s}": orthogonalize_weight_(kernels(*s, dtype=torch.float64).to(device)) for s in shapes}


@entry("closed form: dct", FLOAT64)
def _dct_weights(device: torch.device) -> Figures:
    shapes = ((16, 8, 3, 3), (64, 3, 3, 3), (16, 8, 5), (18, 4, 3, 3))  # the second has three channels
    return {f"{s}": dct_weight_(kernels(*s, dtype=torch.float64).to(device)) for s in shapes}


@entry("torch.func", FLOAT64)
def _transforms(device: torch.device) -> Figures:
    weights = torch.stack([kernels(8, 4, 3, 3, dtype=torch.float64), kernels(8, 4, 3, 3, dtype=torch.float64) * 2])
    weights, value = weights.to(device), library.convolutional_similarity
    gradient = torch.func.grad(value)
    return {
        "grad": gradient(weights[0]),
        "vmap": torch.func.vmap(gradient)(weights),
        "jvp": torch.func.jvp(value, (weights[0],), (weights[1],))[1],
        "hvp": torch.func.jvp(gradient, (weights[0],), (weights[1],))[1],
    }


@entry("torch.compile(fullgraph=True)", FLOAT32)
def _compiled(device: torch.device) -> Figures:
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(kernels(*parameter.shape))
    penalty = library.ConvSimPenalty(model)
    batch = images(4).to(device)

    @torch.compile(fullgraph=True, backend=backend)
    def loss() -> Tensor:
        return model(batch).square().mean() + 1e-3 * penalty()

    with full_precision(device):
        value = loss()
        value.backward()
    return {"loss": value.detach()} | _gradients(model, "compiled")


def smooth_network() -> nn.Module:
    """A network without maxima and kinks, at which rounding would decide where a gradient goes."""
    layers: list[nn.Module] = []
    for channels in (3, 12):
        layers += [nn.Conv2d(channels, 12, 3, stride=2), nn.BatchNorm2d(12), nn.SiLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(48, 10))


@cache
def _data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    splits = (
        Split(
            torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8),
            torch.randint(10, (count,), generator=generator),
        )
        for count in (96, 32)
    )
    return Dataset("noise", *splits, 10, (0.5,) * 3, (0.3,) * 3)


def _trainer(device: torch.device, **arguments: Any) -> Trainer:
    choose_algorithms(deterministic=False)
    given = Arguments(**{"batch_size": 32, "epochs": 2, "iterations": 10, **arguments})
    given.check()
    torch.manual_seed(0)
    model = smooth_network().to(device)
    if MODES[given.mode].initializes or MODES[given.mode].scales:
        data = _data()
        normalized = data.normalize(data.train.images).to(device)
        prepare_(model, given, lambda: normalized, lambda _: None)
    return Trainer(model, _data(), given, device)


def _trained(trainer: Trainer, epochs: int = 2) -> Figures:
    """Losses and L_CS of epochs, the kernels after them, and β. Accuracies jump where a loss does not."""
    found: Figures = {}
    for epoch in range(epochs):
        row = trainer.run_epoch()
        found |= {f"epoch {epoch} {key}": row[key] for key in ("train_loss", "test_loss", "cs")}
    return found | convolutions(trainer.model) | {"beta": trainer.beta}


VARIANTS: dict[str, dict[str, Any]] = {
    "orthogonal": {"mode": "init", "method": "orthogonal"},
    "decorrelate": {"mode": "init", "method": "decorrelate"},
    "beta auto": {"mode": "reg", "beta": "auto"},
    "beta by loss": {"mode": "reg", "beta_schedule": "loss", "preserve_norm": True},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01},
    "flip-crop": {"augment": "flip-crop"},
    "modern recipe": {
        **{"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": "cosine", "warmup": 1},
        **{"augment": "flip-crop", "label_smoothing": 0.1},
    },
    "running statistics": {"bn_statistics": "running"},
}


def _training_entries() -> Iterator[Entry]:
    variants = {f"mode {mode}": {"mode": mode} for mode in MODES} | VARIANTS
    for name, arguments in variants.items():
        yield Entry(f"train: {name}", FLOAT32, lambda device, a=arguments: _trained(_trainer(device, **a)))


@entry("train: resume", FLOAT32)
def _resumed(device: torch.device) -> Figures:
    """Stop after an epoch, save, and go on in another trainer: the same, on a device to the bit."""
    arguments = {"mode": "reg", "beta": "auto", "momentum": 0.9, "augment": "flip-crop"}
    whole, first, second = (_trainer(device, **arguments) for _ in range(3))
    expected = _trained(whole)
    first.run_epoch()
    saved = io.BytesIO()
    torch.save(first.state(), saved)
    saved.seek(0)
    second.load_state(torch.load(saved, map_location="cpu", weights_only=True))
    found = _trained(second, 1)
    names = {"epoch 0 train_loss": "epoch 1 train_loss"}
    for name, value in found.items():
        _require_close(value, expected[names.get(name, name.replace("epoch 0", "epoch 1"))], name)
    return found


def _require_close(found: Any, expected: Any, name: str) -> None:
    if (apart := difference(found, expected)) > FLOAT32:
        raise ArithmeticError(f"resumed training differs: {name} by {apart:.2g}")


@entry("convsim init", FLOAT32)
def _command_init(device: torch.device) -> Figures:
    with _folder() as folder:
        path, found = folder / "model.safetensors", {}
        for name, how in {
            "raw": ("--iterations", ITERATIONS),
            "norm-preserving": ("--iterations", ITERATIONS, "--preserve-norm", "--probe", "natural"),
            "orthogonal": ("--method", "orthogonal"),
            "decorrelate": ("--method", "decorrelate", "--input", "natural", "--samples", 64),
        }.items():
            document = _convsim("init", "--arch", "cnn:8", "-o", path, *how, "--no-backup", "--device", device)
            found |= {f"{name} {key}": value for key, value in (numbers(document["layers"]) | load_file(path)).items()}
            path.unlink()
        return {key: value for key, value in found.items() if not isinstance(value, Tensor) or value.ndim == 4}


@entry("convsim measure", FLOAT32)
def _command_measure(device: torch.device) -> Figures:
    arguments = ("measure", "--arch", "cnn:8", "--input", "natural", "--device", device)
    return numbers(_convsim(*arguments)["layers"])


@entry("convsim train, --resume, compare and plot", FLOAT32)
def _command_train(device: torch.device) -> Figures:
    with _folder() as folder:
        data, runs = f"folder:{_image_folder().name}", folder / "runs"
        common = ("--arch", "cnn:8", "--dataset", data, "--batch-size", 16, "--device", device, "--run-dir", runs)
        common += ("--lr", 0.001)  # small, for it has kinks (`smooth_network`)
        found: Figures = {}
        for mode in ("baseline", "init"):
            more = ("--iterations", 10) if mode == "init" else ()
            _convsim("train", "--mode", mode, *more, *common, "--epochs", 1, "--name", mode)
            document = _convsim("train", "--resume", runs / mode, "--epochs", 2)
            found[f"{mode} cs"] = document["runs"][0]["cs"]
            weights = load_file(runs / mode / "last.safetensors")
            found |= {f"{mode} {name}": weight for name, weight in weights.items() if weight.ndim == 4}
        compared = _convsim("compare", runs / "baseline", runs / "init")
        found["compared"] = float(len(json.dumps(compared)) > 100)
        _convsim("plot", runs / "baseline", runs / "init", "-o", folder / "curves.png", document=False)
        found["drawn"] = float((folder / "curves.png").stat().st_size > 1000)
        return found


@entry("convsim reproduce", FLOAT32)
def _command_reproduce(device: torch.device) -> Figures:
    from torchvision.datasets import cifar

    with _folder() as folder:
        write_cifar10(folder)
        checked, cifar.check_integrity = cifar.check_integrity, lambda *_: True
        try:
            size = ("--archs", "cnn1", "--epochs", 1, "--limit-train", 64, "--limit-test", 20)
            where = ("--data-dir", folder, "--run-dir", folder / "runs", "--device", device)
            document = _convsim("reproduce", "table5", "--arms", "baseline,reg", *size, *where)
        finally:
            cifar.check_integrity = checked
        found = {f"{row['arm']} cs": row["measured"]["cs"] for row in document["rows"]}
        for row in document["rows"]:
            weights = load_file(Path(row["runs"][0]) / "last.safetensors")
            found |= {f"{row['arm']} {name}": weight for name, weight in weights.items() if weight.ndim == 4}
        return found


@entry("torchrun, 2 ranks", FLOAT32)
@cache  # on the CPU against the CPU, starting all these processes once is enough
def _torchrun(device: torch.device) -> Figures:
    if device.type == "cuda" and (count := torch.cuda.device_count()) < 2:
        raise SkippedError(f"nccl takes no two ranks on one device, and this machine has {count}")
    with _folder() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "convsim_cli", "train", "--mode", "reg", "--arch", "cnn:8", "--name", "two", "--epochs", "1"]
        command += ["--dataset", f"folder:{_image_folder().name}", "--batch-size", "16", "--run-dir", str(folder), "-q"]
        settings = environment(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        command += ["--device", device.type, "--lr", "0.001"]
        with subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
            try:
                said, _ = launcher.communicate()
            except BaseException:
                launcher.terminate()  # a launcher that is killed leaves its ranks behind
                raise
        if launcher.returncode:
            raise RuntimeError(said.decode()[-250:])
        weights = load_file(folder / "two" / "last.safetensors")
        return {name: weight for name, weight in weights.items() if weight.ndim == 4}


@entry("torch.distributed, 1 rank", FLOAT32)
def _one_rank(device: torch.device) -> Figures:
    """A step under DistributedDataParallel, over nccl on CUDA: what one device can show of it."""
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = network(device, torch.float32)
        parallel = nn.parallel.DistributedDataParallel(model)
        penalty = library.ConvSimPenalty(parallel)
        with full_precision(device):
            loss = parallel(images(16).to(device)).square().mean()
            loss.backward()
        penalty.add_gradient_(1e-2)
        total = loss.detach().clone()
        distributed.all_reduce(total)
        box = ["shared"]
        distributed.broadcast_object_list(box, src=0)
        return {"loss": total, "box": float(box == ["shared"])} | _gradients(model, "parallel")
    finally:
        parallel = penalty = None
        gc.collect()  # a DistributedDataParallel must not outlive its group
        distributed.destroy_process_group()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@cache
def _image_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of images of two classes, there until this process ends."""
    from torchvision.io import write_png

    kept = tempfile.TemporaryDirectory()
    for number, image in enumerate(_data().train.images[:60].permute(0, 3, 1, 2)):
        path = Path(kept.name, ("even", "odd")[number % 2], f"{number}.png")
        path.parent.mkdir(exist_ok=True)
        write_png(image.contiguous(), str(path))
    return kept


def _convsim(*arguments: object, document: bool = True) -> Any:
    """Run a command in this process, and return its document. Raises RuntimeError with what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command([*map(str, arguments), *(["--json"] if document else []), "-q"])
    if code:
        raise RuntimeError(f"convsim {arguments[0]} ended with {code}: {err.getvalue()}")
    return json.loads(out.getvalue()) if document else None


ENTRIES += [*_objective_entries(), *_training_entries()]


def difference(found: Any, expected: Any) -> float:
    """Return the relative difference, ∞ where one of two figures is not there or is no number."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    ours, theirs = (torch.as_tensor(value).detach().cpu().double() for value in (found, expected))
    if ours.shape != theirs.shape:
        return math.inf
    apart, size = torch.linalg.vector_norm(ours - theirs).item(), torch.linalg.vector_norm(theirs).item()
    relative = apart / size if size else apart
    return relative if math.isfinite(relative) else math.inf


def compare(one: Entry, device: torch.device, patience: float) -> dict[str, Any]:
    """Compute an entry on the CPU and on a device, and return its row."""
    start, row = time.perf_counter(), {"name": one.name, "difference": None, "limit": one.limit}
    try:
        with time_limit(patience), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of drivers and compilers
            found, expected = one.compute(device), one.compute(CPU)
        if expected.keys() != found.keys() or not found:
            raise ArithmeticError(f"other figures: {sorted(expected.keys() ^ found.keys())[:5]}")
        worst = max(found, key=lambda name: difference(found[name], expected[name]))
        row["difference"] = difference(found[worst], expected[worst])
        row["outcome"] = "ok" if row["difference"] <= one.limit else f"FAILED: {worst}"
    except SkippedError as error:
        row |= {"outcome": "skipped", "reason": str(error)}
    except Exception as error:
        row["outcome"] = f"FAILED: {in_one_line(error)}"
    return row | {"seconds": time.perf_counter() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only the entries with such names")
    parser.add_argument("--patience", type=float, default=60, help="seconds that one entry may take")
    given = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small are quicker without others
    device, rows = resolve_device(given.device), []
    print("entry", "difference", "limit", "outcome", "seconds", sep="\t", flush=True)
    for one in ENTRIES:
        if not fnmatchcase(one.name, given.only):
            continue
        row = compare(one, device, given.patience)
        rows.append(row)
        apart = "" if row["difference"] is None else f"{row['difference']:.1e}"
        outcome = row["outcome"] + (f": {row['reason']}" if "reason" in row else "")
        print(row["name"], apart, f"{row['limit']:.0e}", outcome, f"{row['seconds']:.1f}", sep="\t", flush=True)
        if given.output:
            save(given.output, {"device": str(device), "torch": torch.__version__, "rows": rows})
    return int(any(row["outcome"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
