"""How far filters turn while a network trains: per step, and since the start.

A step changes a filter's norm and its direction. Behind batch normalization the norm does not change what the network
computes; it decides how far a step turns the direction: scaling every convolution by f and training at the rate η is
the same training as leaving it and training the convolutions at η/f² (SGD, with or without momentum, without weight
decay, batch normalization's ε scaled too).

The angle between two filters is 2·atan2(‖u − v‖, ‖u + v‖) of their directions u and v: exact for small angles, of which
the arc cosine loses everything below 0.02 degrees in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError, describe_tensor, is_number, kind_of
from convsim_cli.kernels import (
    Kernel,
    Patterns,
    living_filters,
    module_kernels,
    refuse_meta,
    warn_of_unsupported,
    weight_of,
)


def filter_angles(kernel: Kernel, weight: Tensor, former: Tensor) -> Tensor:
    """Return the angle in degrees, 0 to 180, between each filter and the same filter of a former weight: `[S]`.

    weight, former: as stored. NaN for a filter that is zero in either.
    """
    rows = [kernel.to_filters(each).flatten(0, 1).flatten(1) for each in (weight, former)]
    units = [each / each.abs().amax(-1, keepdim=True) for each in rows]  # their squares stay in float32's range
    ours, theirs = (nn.functional.normalize(each, dim=-1, eps=0) for each in units)
    apart, together = torch.linalg.vector_norm(ours - theirs, dim=-1), torch.linalg.vector_norm(ours + theirs, dim=-1)
    return torch.rad2deg(2 * torch.atan2(apart, together))


class TurnMonitor:
    """Measures how far filters that form pairs turn: call it after each optimizer step.

    every: measure every so many steps, including the first; calls in between cost nothing. include, exclude: globs over
    names of kernels, such as `layer1.*`. The monitor keeps a copy of the kernels as they are when it is made, and
    another one during the steps that it measures. Filters that are dead at the start (a norm below 1e-6 of the largest
    in their layer) are left out. Parametrized layers count with the weight that they compute. Nothing waits for the
    device before `rows`, which waits once and restarts `turn_per_step`. To resume training, save `state()` and pass
    it to `load_state` of a new monitor, once the model has its weights.

    Warns about layers that it leaves out, such as depthwise ones, and about a model without kernels. Raises InputError
    for another `every`, for a pattern that matches nothing and for a model on the meta device. A call raises InputError
    if a layer is gone, or has a weight of another shape than when the monitor was made.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> optimizer, turned = torch.optim.SGD(model.parameters(), lr=0.1), TurnMonitor(model)
    >>> model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> turned()
    >>> [row["layer"] for row in turned.rows()]
    ['0.weight']
    """

    def __init__(
        self, model: nn.Module, every: int = 1, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        if not (is_number(every, whole=True) and every >= 1):
            raise InputError(f"`every` is {every!r}; expected a number of steps, 1 or more")
        self._model, self._every, self._steps = model, every, 0
        selection = module_kernels(model, Patterns(include, exclude), parametrized=True)
        warn_of_unsupported(selection)
        self._kernels = selection.kernels
        self._start: Mapping[str, Tensor] = self._copies()
        self._living = {
            kernel.name: living_filters(kernel.to_filters(self._start[kernel.name])).flatten()
            for kernel in self._kernels
        }
        self._before: Mapping[str, Tensor] | None = self._start
        self._turns: dict[str, list[Tensor]] = {}  # since the last `rows`

    @torch.no_grad()
    def __call__(self) -> None:
        """Record one optimizer step."""
        if self._before is not None:
            for kernel in self._kernels:
                angles = self._angles(kernel, self._weight(kernel), self._before[kernel.name])
                self._turns.setdefault(kernel.name, []).append(angles)
            self._before = None
        self._steps += 1
        if self._steps % self._every == 0:
            self._before = self._copies()

    @torch.no_grad()
    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer for the steps since the last call; the next step is measured again.

        A row has `layer`, the kernel's name; `norm`, the mean L2 norm of the living filters; `turn_per_step`, the
        median over filters and steps in degrees; and `turned`, the median angle in degrees from the kernels that the
        monitor began with. Of an even number of angles the median is the lower of the two in the middle. None if no
        step was measured, and in a layer without a living filter.
        """
        found = []
        for kernel in self._kernels:
            weight, turns = self._weight(kernel), self._turns.pop(kernel.name, [])
            wide = torch.float32 if weight.device.type == "mps" else torch.float64  # small squares must not underflow
            norms = torch.linalg.vector_norm(kernel.to_filters(weight), dim=(-2, -1), dtype=wide).flatten()
            start = self._start.get(kernel.name)
            norm = norms.masked_fill(~self._living[kernel.name].to(norms.device), torch.nan).nanmean()
            unknown = torch.full_like(norm, torch.nan)  # on the layer's device, whatever the default one is
            found += [
                norm,
                torch.cat([each.to(norm.device) for each in turns]).nanmedian() if turns else unknown,
                unknown if start is None else self._angles(kernel, weight, start).nanmedian(),
            ]
        figures = iter(_read(found))
        keys = ("norm", "turn_per_step", "turned")
        rows = [{"layer": kernel.name, **{key: next(figures) for key in keys}} for kernel in self._kernels]
        self._steps, self._before = 0, self._copies()
        return rows

    def last_turns(self) -> dict[str, float | None]:
        """Return each layer's median turn in the last measured step, in degrees. Waits for the device."""
        medians = [turns[-1].nanmedian() for turns in self._turns.values()]
        return dict(zip(self._turns, _read(medians), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Return the kernels of the start, by name, to save with a run."""
        return dict(self._start)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, and the weights that the model has now. Without kernels nothing has `turned`.

        Raises InputError for the state of another network; the monitor is then as it was.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"`state` is {kind_of(state)}; expected what `state()` returned")
        weights = {kernel.name: self._weight(kernel) for kernel in self._kernels}
        for name, was in state.items():
            found = describe_tensor(was) if isinstance(was, Tensor) else kind_of(was)
            if not isinstance(was, Tensor) or name not in weights or was.shape != weights[name].shape:
                raise InputError(f"`state` is of another network: it contains {name}, {found}")
            if not was.is_floating_point() or was.is_meta or was.layout != torch.strided:
                raise InputError(f"`state` contains {name}, {found}; expected dense floating values")
        self._start = {name: was.to(self._living[name].device) for name, was in state.items()}
        for kernel in self._kernels:
            if kernel.name in self._start:
                filters = kernel.to_filters(self._start[kernel.name])
                self._living[kernel.name] = living_filters(filters).flatten()
        self._steps, self._before = 0, self._copies()

    def _angles(self, kernel: Kernel, weight: Tensor, former: Tensor) -> Tensor:
        angles = filter_angles(kernel, weight, former.to(weight.device))  # the model may have moved
        return angles.masked_fill(~self._living[kernel.name].to(angles.device), torch.nan)

    def _weight(self, kernel: Kernel) -> Tensor:
        weight = weight_of(self._model, kernel)
        refuse_meta(kernel.name, weight)
        if weight.shape != kernel.shape:
            raise InputError(
                f"{kernel.name}: its shape is {list(weight.shape)}, and was {list(kernel.shape)} when the TurnMonitor "
                "was created; create a new one"
            )
        return weight

    @torch.no_grad()
    def _copies(self) -> dict[str, Tensor]:
        return {kernel.name: self._weight(kernel).detach().clone() for kernel in self._kernels}


def median_angle(angles: Tensor) -> float | None:
    """Return the median of angles, the lower of two, leaving out NaN; None if nothing is left."""
    found = angles.nanmedian().item()
    return found if found == found else None


def _read(scalars: list[Tensor]) -> list[float | None]:
    """Return the values of scalars, None for NaN, and wait for their device once, not for each."""
    found = torch.stack([scalar.to(scalars[0].device, torch.float32) for scalar in scalars]).tolist() if scalars else []
    return [value if value == value else None for value in found]
