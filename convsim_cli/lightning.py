"""The penalty, the figures of `measure` and how far filters turn, as a callback for Lightning's Trainer.

`from convsim_cli.lightning import ConvSimCallback` needs the package `lightning` or `pytorch_lightning`, whichever the
program uses. Importing this module needs neither: the class is made when its name is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

from convsim_cli.errors import InputError, is_number, to_install

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convsim_cli import ConvSimPenalty, TurnMonitor

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
FIGURES = ("fm_corr", "fm_rank", "ncs", "norm")  # of `measure`, logged for each layer


class _Hooks:
    """Adds a penalty to the gradients, and logs each layer's similarity and rotation once per epoch.

    beta: weight of the penalty; 0 adds none. objective, preserve_norm, include, exclude: as
    `ConvSimPenalty` and its `add_gradient_` take them; layers that are left out are not measured either. images: what
    `measure` takes, but no iterator; if None, the first training batch of each epoch. The first batch is tried before
    the first step.
    measure_every: epochs between measurements, 0 for none. turn_every: steps between measurements of rotation,
    including the first step of each epoch. Raises InputError for another argument when it is made.

    The gradient is added before each optimizer step: after the gradients were unscaled, accumulated and averaged over
    processes, and before they are clipped. For a fused optimizer, whose step unscales, it is scaled as they are. With
    several optimizers, toggle those that do not step (`toggle_optimizer`). Logged are `fm_corr/LAYER`, `fm_rank/LAYER`,
    `ncs/LAYER` and `norm/LAYER`, and in degrees `turn_per_step/LAYER` and `turned/LAYER` since the start of the
    training, also of a resumed one.

    >>> from convsim_cli.lightning import ConvSimCallback
    >>> callback = ConvSimCallback(beta=1e-3, objective="ocnn")  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        beta: float = 0.0,
        objective: str | Callable[..., Tensor] = "cs",
        *,
        preserve_norm: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        images: Tensor | Iterable[Any] | None = None,
        measure_every: int = 1,
        turn_every: int = 50,
    ) -> None:
        super().__init__()
        from convsim_cli.penalty import check_settings

        check_settings(beta, objective, include, exclude, preserve_norm)
        for name, value, least in (("measure_every", measure_every, 0), ("turn_every", turn_every, 1)):
            if not (is_number(value, whole=True) and value >= least):
                raise InputError(f"`{name}` is {value!r}; expected a whole number ≥ {least}")
        if isinstance(images, Iterator):
            raise InputError("`images` is an iterator, which serves one epoch; expected a batch, a list or a loader")
        self._beta, self._objective, self._preserve_norm = beta, objective, preserve_norm
        self._patterns: dict[str, Any] = {"include": include, "exclude": exclude}
        self._images, self._measure_every, self._turn_every = images, measure_every, turn_every
        self._penalty: ConvSimPenalty | None = None
        self._monitor: TurnMonitor | None = None
        self._start: dict[str, Tensor] | None = None  # the kernels of a training that is resumed
        self._batch: Any = None
        self._measurable = False  # whether a batch has been measured
        self._steps = 0

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        from convsim_cli import ConvSimPenalty, TurnMonitor

        self._penalty = ConvSimPenalty(pl_module, self._objective, **self._patterns) if self._beta else None
        self._monitor = TurnMonitor(pl_module, self._turn_every, **self._patterns)
        self._batch = None  # an interrupted training leaves one
        if self._start is not None:
            watched = self._monitor.state()
            self._monitor.load_state({name: was for name, was in self._start.items() if name in watched})
            self._start = None  # the next training begins with its own

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        if self._batch is None and self._is_measured(trainer) and self._images is None:  # resumed, it may not be 0
            self._batch = batch
        if not self._measurable and self._is_measured(trainer):  # tell now, not after an epoch
            hint = "; pass `images=`, or set `measure_every` to 0" if self._images is None else ""
            self._measure(pl_module, [batch] if self._images is None else _first(self._images), hint)
            self._measurable = True
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        if self._penalty is None:
            return
        beta, scaler = self._beta, getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled() and getattr(optimizer, "_step_supports_amp_scaling", False):
            beta = beta * scaler._get_scale_async()  # a fused step unscales the gradients itself
        self._penalty.add_gradient_(beta, self._preserve_norm)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        if self._monitor is not None and trainer.global_step > self._steps:  # not while gradients are accumulated
            self._monitor()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        assert self._monitor is not None
        turns = {row.pop("layer"): row for row in self._monitor.rows()}
        found = [(f"{key}/{name}", row[key]) for name, row in turns.items() for key in ("turn_per_step", "turned")]
        if self._is_measured(trainer):
            images, self._batch = [self._batch] if self._images is None else self._images, None
            records = self._measure(pl_module, images)
            found += [(f"{key}/{record['name']}", record[key]) for record in records for key in FIGURES]
        pl_module.log_dict({name: value for name, value in found if value is not None}, rank_zero_only=True)

    def _measure(self, pl_module: nn.Module, images: Any, hint: str = "") -> list[dict[str, Any]]:
        from convsim_cli import measure

        forward = type(pl_module).forward
        if any(forward is module.LightningModule.forward for module in _imported()):  # which only raises
            raise InputError(
                f"ConvSimCallback: {type(pl_module).__name__} cannot be measured without a `forward` that takes "
                "images; define it, or set `measure_every` to 0"
            )
        try:
            return measure(pl_module, images, **self._patterns)
        except InputError as error:
            raise InputError(f"ConvSimCallback: {error}{hint}") from error

    def state_dict(self) -> dict[str, Any]:
        return {} if self._monitor is None else {"kernels_at_start": self._monitor.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict.get("kernels_at_start")

    def _is_measured(self, trainer: Any) -> bool:
        return self._measure_every > 0 and trainer.current_epoch % self._measure_every == 0


def _first(images: Any) -> Any:
    """The first batch of what `measure` takes."""
    import torch

    if hasattr(images, "shape") or isinstance(images, Mapping):
        return images
    with torch.random.fork_rng(devices=[]):  # a loader draws its order
        return list(islice(images, 1))


def __getattr__(name: str) -> Any:
    """Make the class when it is first used, for every package of Lightning's that the program has imported."""
    if name != "ConvSimCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = _imported()
    for package in PACKAGES if not found else ():
        with suppress(ModuleNotFoundError):
            found = [import_module(package)]
            break
    if not found:
        raise InputError(f"ConvSimCallback needs Lightning, which is not installed: {to_install('lightning')}")
    made = type(
        name, (_Hooks, *(module.Callback for module in found)), {"__module__": __name__, "__doc__": _Hooks.__doc__}
    )
    globals()[name] = made  # the same class from now on, also for pickle
    return made


def _imported() -> list[Any]:
    """Return the packages of Lightning's that the program has imported."""
    return [module for package in PACKAGES if (module := sys.modules.get(package))]
