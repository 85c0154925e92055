"""The training loop: one epoch at a time.

Plain cross entropy by SGD or AdamW; Algorithm 2 adds the gradient of its objective to that of the task. After each
epoch the network is evaluated, with batch-norm statistics re-estimated as the run's `bn_statistics` asks. Several
processes each take a share of every batch.

The order of the images, their flips and their crops depend on the seed and the epoch alone, so that a resumed run draws
the same batches.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsim_cli.batch_norm import batch_norm_layers, batch_statistics, reestimate_statistics
from convsim_cli.device import Advance, generator_states, restore_generators, synchronize
from convsim_cli.errors import ConvsimError, ConvsimWarning, DivergedError, RankZeroFailedError
from convsim_cli.inputs.images import Dataset, Split, evaluation_batch, evaluation_totals
from convsim_cli.kernels import is_convolution
from convsim_cli.penalty import LARGEST_BETA, ConvSimPenalty
from convsim_cli.precision import full_precision, tf32
from convsim_cli.rotation import TurnMonitor
from convsim_cli.training.config import MODES, Arguments
from convsim_cli.training.distributed import ALONE, Processes

VALIDATION_COLUMNS = ("validation_loss", "validation_accuracy")  # of `results.csv`, with validation images
STATISTICS_IMAGES = 4096  # training images that batch-norm statistics are re-estimated on
_MOST_IMAGES, _MOST_PIXELS = 512, 64 * 224 * 224  # of one such batch
PADDING = 4  # black pixels on each side, before the crop
SAMPLED_STEPS = 4  # of an epoch, over which the turn per step is taken
LARGE_TURN = 10.0  # degrees, of a layer's median filter in the first step
_COMPILED: list[str] = []  # the network, and the size of its batches, that torch.compile keeps graphs of
AUTO_BETA = 0.01  # of the task's gradient, that β times the objective's is at the first batch with `beta` auto


class Trainer:
    """A network in training, one epoch at a time, and the state that a resume needs.

    The task loss is the cross entropy. Batches are drawn without replacement, in an order that only the seed and the
    epoch decide. Nothing in the loop waits for the device. Several processes each take a share of every batch; together
    they do what one process would, except that batch normalization sees one share at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        arguments: Arguments,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        # tensor cores and CPUs take NHWC as it is; float32 on CUDA uses no tensor cores
        is_plain = device.type == "cuda" and arguments.precision == "fp32"
        layout = torch.contiguous_format if is_plain else torch.channels_last
        self.model = model.to(device)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 4:  # channels_last knows no other number of axes
                tensor.data = tensor.data.to(memory_format=layout)
        self.dataset = replace(resident(dataset, device), layout=layout)
        self.arguments = arguments
        self.device = device
        self.processes = processes
        self.mode = MODES[arguments.mode]
        self.penalty = ConvSimPenalty(model, arguments.objective)  # in every mode: its value is the column `cs`
        self.optimizer = make_optimizer(model, arguments)
        self._statistics_batches = [
            indices.to(device) for indices in statistics_batches(dataset.train, arguments.seed, processes.size)
        ]
        self.turned = TurnMonitor(self.model, every=math.ceil(self.steps / SAMPLED_STEPS))
        self.epoch = 0
        self.evaluation_seconds = 0.0  # of the last epoch
        self.first_loss: Tensor | None = None
        self.beta = None if arguments.beta == "auto" else float(arguments.beta)  # None until the first batch
        self._parallel: Callable[[Tensor], Tensor] = processes.parallel(self.model)
        if arguments.compile:
            forget_other_graphs(f"{arguments.batch_size} {model}")
        self._compiled = compile_network(self._parallel, device) if arguments.compile else None

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch. The last batch may be smaller."""
        return math.ceil(len(self.dataset.train) / self.arguments.batch_size)

    def run_epoch(self, advance: Advance | None = None) -> dict[str, float]:
        """Train for one epoch, evaluate, and return its row of `results.csv`.

        advance: called with 1 after every step. Raises DivergedError if a loss is no longer finite.
        """
        start = time.perf_counter()
        # fp32 means fp32; bf16 is switched on inside
        with (tf32 if self.arguments.precision == "tf32" else full_precision)(self.device):
            loss, accuracy = self.train_batches(advance)
            self.processes.broadcast_buffers(self.model)
            trained = time.perf_counter()
            with self._autocast():
                (test_loss, test_accuracy), *validation = self.evaluate()
            self.evaluation_seconds = time.perf_counter() - trained
        row = {
            "epoch": self.epoch + 1,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "cs": self.penalty.value().item(),
            "seconds": time.perf_counter() - start,
            **{name: value for found in validation for name, value in zip(VALIDATION_COLUMNS, found, strict=True)},
        }
        if not all(map(math.isfinite, row.values())):
            said = f"the loss is {loss:g} in training and {test_loss:g} in testing"
            said += f", {row['validation_loss']:g} in validation" if "validation_loss" in row else ""
            said += f"; lower `lr`{' or `beta`' * self.mode.regularizes}"
            if all(math.isfinite(value) for name, value in row.items() if name != "cs"):
                said = f"L_CS of the kernels is {row['cs']:g}; start from smaller ones, or lower `lr`"
            raise self._diverged(f"epoch {row['epoch']}: {said}")
        self.epoch += 1
        return row

    def state(self) -> dict[str, Any]:
        """Return what a bit-exact resume needs besides the arguments. All processes must call this."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        on_device = torch.mps.get_rng_state() if self.device.type == "mps" else on_device
        optimizer = self.optimizer.state_dict()
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "without_state": [number for number in numbers if number not in optimizer["state"]],
            "first_loss": self.first_loss,
            "beta": self.beta,
            "kernels_at_start": self.turned.state(),
            "rng": self.processes.gather((torch.get_rng_state(), on_device, generator_states())),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; one from an earlier version may lack `beta`, kernels, and Python generators.

        Raises ValueError for one of another structure, and whatever else a damaged one leads to.
        """
        first_loss, beta, kernels = state["first_loss"], state.get("beta", self.beta), state.get("kernels_at_start", {})
        if len(state["rng"]) != self.processes.size:
            raise ValueError(f"rng of {len(state['rng'])} processes, expected {self.processes.size}")
        on_cpu, on_device, *others = state["rng"][self.processes.rank]
        if beta is not None and not (type(beta) in (int, float) and 0 <= beta <= LARGEST_BETA):
            raise ValueError(f"beta is {beta!r:.80}")
        check_tensors(state["model"], self.model.state_dict(), "model")
        check_tensors(kernels, self.turned.state() if kernels else {}, "kernels_at_start")
        check_tensors(
            {"first_loss": first_loss}, {"first_loss": None if first_loss is None else torch.tensor(0.0)}, "trainer"
        )
        self._check_optimizer(state)
        self.epoch, self.beta = state["epoch"], beta
        self.model.load_state_dict(state["model"])
        own = self.optimizer.state_dict()["param_groups"]  # the settings are those of the arguments
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        self.first_loss = None if first_loss is None else first_loss.to(self.device)
        self.turned.load_state(kernels)
        torch.set_rng_state(on_cpu)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(on_device, self.device)
        if self.device.type == "mps" and on_device is not None:  # which earlier versions did not save
            torch.mps.set_rng_state(on_device)
        for states in others:
            restore_generators(states)

    def _check_optimizer(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless the optimizer's state has the tensors of each parameter that had been trained."""
        saved = state["optimizer"]
        groups = [len(group["params"]) for group in saved["param_groups"]]
        expected = [len(group["params"]) for group in self.optimizer.param_groups]
        if groups != expected:
            raise ValueError(f"optimizer: groups of {groups} parameters, expected {expected}")
        momentum = ["momentum_buffer"] if self.arguments.momentum else []
        names = {"adamw": ["step", "exp_avg", "exp_avg_sq"], "sgd": momentum}[self.arguments.optimizer]
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        if unknown := saved["state"].keys() - range(len(parameters)):
            raise ValueError(f"optimizer: has parameters {sorted(unknown)} that the network does not have")
        untrained = [number for number, one in enumerate(parameters) if not (state["epoch"] and one.requires_grad)]
        without = state.get("without_state", untrained)  # those without a gradient; of an earlier version not known
        for number, parameter in enumerate(parameters):
            like = {name: torch.tensor(0.0) if name == "step" else parameter for name in names if number not in without}
            check_tensors(saved["state"].get(number, {}), like, f"optimizer, parameter {number}")

    def train_batches(self, advance: Advance | None) -> tuple[float, float]:
        """Train on the batches of an epoch; return the mean loss and the accuracy in per cent. See `run_epoch`."""
        self.model.train()
        data = self.dataset.train
        # the sums of the loss and of correct predictions stay on the device until the end of the epoch
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        totals = torch.zeros(2, dtype=wide, device=self.device)
        order = permutation(len(data), self.arguments.seed, self.epoch).to(self.device)
        augmentation = None
        if self.arguments.augment == "flip-crop":
            augmentation = FlipCrop.draw(len(data), self.arguments.seed, self.epoch, self.device)
        for number, batch in enumerate(order.split(self.arguments.batch_size)):
            if self.arguments.schedule != "constant" or self.arguments.warmup:
                for group in self.optimizer.param_groups:
                    rate = learning_rate(self.arguments, self.epoch * self.steps + number, self.steps)
                    group["lr"] = rate * group.get("factor", 1.0)
            indices = self.processes.share(batch)
            weight = len(indices) * self.processes.size / len(batch)  # of this share in the mean over processes
            if not len(indices):
                indices = batch[:1]  # fewer images than processes: this one is computed with a weight of 0
            images, labels = data.images[indices], data.labels[indices]
            if augmentation:
                images = augmentation.apply(images, indices)
            # a smaller last batch would be compiled too; padded, it would change the batch statistics
            whole = len(batch) == min(self.arguments.batch_size, len(data))
            forward = self._compiled if self._compiled and whole else self._parallel
            with self._autocast():
                logits = forward(self.dataset.normalize(images))
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.arguments.label_smoothing)
            self.optimizer.zero_grad()
            (loss if weight == 1 else weight * loss).backward()
            self._regularize(loss.detach(), weight)
            self.optimizer.step()
            self.turned()
            if self.epoch == number == 0 and self.processes.is_rank_zero:
                self._warn_of_large_turns()
            if weight:
                totals += torch.stack([loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()])
            if advance:
                advance(1)
        synchronize(self.device)
        loss_sum, correct = self.processes.sum(totals).tolist()
        return loss_sum / len(data), 100 * correct / len(data)

    def _warn_of_large_turns(self) -> None:
        """Warn if the first step turned the filters far from their initial directions."""
        turns = {name: turn for name, turn in self.turned.last_turns().items() if turn and turn > LARGE_TURN}
        if turns:
            worst = max(turns, key=lambda name: turns[name])
            slower = "a lower " + ("`kernel_lr`" if self.arguments.kernel_lr else "`lr`")
            slower += ", or no `factor`" if self.arguments.factor is not None else ""
            others = f", and {len(turns) - 1} more layers by over {LARGE_TURN:g}" if len(turns) > 1 else ""
            warnings.warn(
                f"the first step turned the median filter of {worst} by {turns[worst]:.0f} degrees{others}; to keep "
                f"the initial directions, use `warmup` or {slower}",
                ConvsimWarning,
                stacklevel=2,
            )

    def _regularize(self, loss: Tensor, weight: float) -> None:
        """Algorithm 2: add β·∂L_CS to the gradients. With the schedule `loss`, β falls with the task loss."""
        if not self.mode.regularizes:
            return
        if self.beta is None:
            self.beta = self._matched_beta()
        if self.arguments.beta_schedule == "constant":
            return self.penalty.add_gradient_(self.beta, self.arguments.preserve_norm)
        loss = self.processes.sum(weight * loss) / self.processes.size
        if self.first_loss is None:
            self.first_loss = loss
        beta = self.beta * loss / self.first_loss
        if beta.device.type == "cpu" and not beta.isfinite():  # elsewhere to look would wait; the epoch's end tells
            raise self._diverged(f"epoch {self.epoch + 1}: the loss is {loss:g} in training; lower `lr` or `beta`")
        self.penalty.add_gradient_(beta, self.arguments.preserve_norm)

    def _matched_beta(self) -> float:
        """`beta` auto: the same number in every process. Raises DivergedError if it is not finite, or 0."""
        ratio = self.penalty.gradient_ratio(self.arguments.preserve_norm)
        beta = AUTO_BETA * self.processes.sum(ratio).item() / self.processes.size
        if not 0 < beta < math.inf:
            raise self._diverged(
                f"`beta` auto: the task's gradient is {beta / AUTO_BETA:g} times the objective's at the first batch; "
                "give `beta` as a number"
            )
        return beta

    def _diverged(self, reason: str) -> Exception:
        """Return what to raise in every process for what all of them found: rank 0 tells."""
        return DivergedError(reason) if self.processes.is_rank_zero else RankZeroFailedError()

    def evaluate(self) -> list[tuple[float, float]]:
        """Return loss and accuracy (per cent) on the test images, and on the validation images if there are any.

        The statistics that `precise` re-estimates stay in the model, to be saved with it.
        """
        if self.arguments.bn_statistics == "precise":
            reestimate_together(self.model, self.dataset, self._statistics_batches, self.processes)
        own, found = self.arguments.bn_statistics == "batch", []
        with batch_statistics(self.model) if own else nullcontext():
            splits = list(filter(None, (self.dataset.test, self.dataset.validation)))
            shares = [Split(self.processes.share(each.images), self.processes.share(each.labels)) for each in splits]
            forward: Callable[[Tensor], Tensor] = self.model  # a compiled DDP would communicate
            by_batch = own or len(batch_norm_layers(self.model)) < sum(
                isinstance(layer, _BatchNorm) for layer in self.model.modules()
            )
            if self._compiled and self.processes.size == 1 and not by_batch:  # zeros would count in the statistics
                forward = partial(run_padded, self._compiled, max(map(evaluation_batch, shares)))
            for split, share in zip(splits, shares, strict=True):
                totals = evaluation_totals(self.model, self.dataset, share, self.device, forward)
                loss, correct = self.processes.sum(totals).tolist()
                found.append((loss / len(split), 100 * correct / len(split)))
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.arguments.precision == "bf16" else nullcontext()


def check_tensors(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless two dictionaries have the same names, for tensors of the same dtypes and shapes."""

    def describe(value: Any) -> str:
        if not isinstance(value, Tensor):
            return "missing" if value is None else f"a {type(value).__name__}"
        odd = " without values" if value.is_meta else " sparse" if value.layout is not torch.strided else ""
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{odd}"

    for name in {**expected, **found}:
        ours, theirs = describe(found.get(name)), describe(expected.get(name))
        if ours != theirs:
            raise ValueError(f"{where}: {name} is {ours}, expected {theirs}")


def resident(dataset: Dataset, device: torch.device) -> Dataset:
    """Return the dataset with all of its images on a device. Raises ConvsimError if they do not fit."""
    try:
        return dataset.to(device)
    except torch.cuda.OutOfMemoryError as error:
        images = (dataset.train.images, dataset.test.images)
        count, size = sum(map(len, images)), sum(split.nbytes for split in images)
        height, width = images[0].shape[1:3]
        raise ConvsimError(
            f"the {count:,} images of {dataset.name} ({height}×{width}, {size / 1e9:.3g} GB) do not fit into the "
            f"memory of {device}, where training keeps them; lower `limit_train` or `image_size`, or choose another "
            "`device`"
        ) from error


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training images in an epoch, `[count]`."""
    return torch.randperm(count, generator=_generator(seed, epoch, "order"))


def statistics_batches(split: Split, seed: int, processes: int = 1) -> tuple[Tensor, ...]:
    """Return the indices of the images that statistics are re-estimated on, in equal batches: the first of epoch 0.

    They are the same at every epoch, so that the statistics depend on the weights alone. Each process gets as many
    batches as the others: synchronized layers wait for each other. If the images cannot be divided so, the last few
    are left out.
    """
    indices = permutation(len(split), seed, 0)[:STATISTICS_IMAGES]
    if len(indices) < processes:
        return processes * (indices,)
    height, width = split.images.shape[1:3]
    most = max(1, min(_MOST_IMAGES, _MOST_PIXELS // (height * width)))
    fewest = min(math.ceil(len(indices) / (most * processes)), len(indices) // processes)
    rounds = min(range(fewest, 2 * fewest), key=lambda rounds: len(indices) % (rounds * processes))
    count = rounds * processes
    size = len(indices) // count
    return indices[: count * size].split(size)


@dataclass(frozen=True)
class FlipCrop:
    """What happens to each training image in one epoch: a crop of the padded image, mirrored or not.

    mirrored: `[n]` bool. corners: `[n, 2]` int64, row and column of each crop, from 0 to 2·PADDING.
    """

    mirrored: Tensor
    corners: Tensor

    @staticmethod
    def draw(count: int, seed: int, epoch: int, device: torch.device) -> FlipCrop:
        """Draw the crops and flips of an epoch, independently for each of `count` images."""
        source = _generator(seed, epoch, "augmentation")
        mirrored = torch.rand(count, generator=source) < 0.5
        corners = torch.randint(2 * PADDING + 1, (count, 2), generator=source)
        return FlipCrop(mirrored.to(device), corners.to(device))

    def apply(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return images `[B, height, width, 3]` cropped and flipped. indices: which training images they are."""
        count, height, width, channels = images.shape
        padded = torch.nn.functional.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
        corners, columns = self.corners[indices], torch.arange(width, device=images.device)
        columns = torch.where(self.mirrored[indices, None], columns.flip(0), columns) + corners[:, 1:]
        rows = corners[:, :1] + torch.arange(height, device=images.device)
        rows += torch.arange(count, device=images.device)[:, None] * padded.shape[1]
        pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # one gather is 3 times as fast as a[i, y, x]
        return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


def _generator(seed: int, epoch: int, purpose: Literal["order", "augmentation"]) -> torch.Generator:
    offset = {"order": 0, "augmentation": 500_000}[purpose]  # beyond the epochs of a run, within those of its seed
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch + offset)


def make_optimizer(model: nn.Module, arguments: Arguments) -> torch.optim.Optimizer:
    """Return the optimizer that a run's arguments ask for.

    There is one group of parameters unless they are treated differently: kernels with a rate of their own, and biases
    and batch normalization without decay. A group's `factor` is its learning rate over `lr`.
    """
    lr, decay = arguments.lr, arguments.weight_decay
    parameters: Any = list(model.parameters())
    if arguments.kernel_lr or (decay and arguments.decay == "weights"):
        kernels = {
            parameter
            for layer in filter(is_convolution, model.modules())
            for name, parameter in layer.named_parameters()
            if name != "bias"  # of a parametrized layer, the parameters behind its weight
        }
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in parameters:
            kind = parameter in kernels, not decay or arguments.decay == "all" or parameter.ndim > 1
            groups.setdefault(kind, []).append(parameter)
        parameters = []
        for (is_kernel, decays), members in groups.items():
            factor = arguments.kernel_lr / lr if arguments.kernel_lr and is_kernel else 1.0
            weight_decay = decay if decays else 0.0
            parameters.append({"params": members, "lr": factor * lr, "weight_decay": weight_decay, "factor": factor})
    settings: dict[str, Any] = {"lr": lr, "weight_decay": decay, "fused": True}
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    return torch.optim.SGD(parameters, momentum=arguments.momentum, nesterov=arguments.nesterov, **settings)


def choose_algorithms(deterministic: bool) -> Callable[[], None]:
    """Allow only deterministic algorithms from now on, or let cuDNN time its own for each shape of images.

    Call it before the first product on the device. Returns a function that restores the former choice.
    """
    former = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    def restore() -> None:
        torch.backends.cudnn.benchmark = former[0]
        if deterministic:
            torch.use_deterministic_algorithms(former[1], warn_only=warns_only)

    return restore


def forget_other_graphs(what: str) -> None:
    """Let torch.compile forget what was compiled for another network, or another size of batches.

    It counts all that it compiles as variants of one function, and runs what is beyond the eighth as it is.
    """
    if _COMPILED and what not in _COMPILED:
        torch._dynamo.reset()
    _COMPILED[:] = [what]


def compile_network(model: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Compile a network for each size of batch by itself.

    On CUDA this gives graphs that are replayed without work for the host in between.
    """
    return torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)


def run_padded(network: Callable[[Tensor], Tensor], size: int, images: Tensor) -> Tensor:
    """Run a network in evaluation mode on a batch that is filled up to a size: it is compiled for one size alone."""
    return network(nn.functional.pad(images, (0,) * 7 + (size - len(images),)))[: len(images)]


def learning_rate(arguments: Arguments, step: int, steps: int) -> float:
    """Return the learning rate of a run's optimizer step, which depends on nothing else.

    step: counted from 0 over the whole run. steps: in an epoch. With W steps of warm-up and T in all, step s takes
    lr·(s + 1)/W for s < W; after that lr, or with the cosine schedule lr·(1 + cos(π(s − W)/(T − W)))/2, the half wave
    of Loshchilov and Hutter (2017), equation 5, once from lr to 0.
    """
    warmup = arguments.warmup * steps
    if step < warmup:
        return arguments.lr * (step + 1) / warmup
    if arguments.schedule == "constant":
        return arguments.lr
    return arguments.lr * (1 + cos(pi * (step - warmup) / (arguments.epochs * steps - warmup))) / 2


def reestimate_together(
    model: nn.Module, dataset: Dataset, batches: Sequence[Tensor], processes: Processes = ALONE
) -> None:
    """Re-estimate the batch-norm statistics of a network in training mode, in place, on batches of training images.

    batches: indices, on the device: equal batches, and equally many for each process. The averages are those over all
    batches. A layer that its owner keeps in evaluation mode trains with its statistics, and keeps them. All processes
    of a run must call this.
    """
    layers = [layer for layer in batch_norm_layers(model) if layer.training]
    share = batches[processes.rank :: processes.size]
    reestimate_statistics(model, (dataset.normalize(dataset.train.images[indices]) for indices in share), layers)
    if processes.size == 1:
        return
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            assert statistic is not None  # these layers keep statistics
            processes.sum(statistic.div_(processes.size))
