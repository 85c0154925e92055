"""Closed forms: filters that are orthogonal, of one spatial pattern each, or whose feature maps are uncorrelated.

In all three, every filter keeps its own L2 norm, and groups are treated separately. They go as far as the rank does:
more filters than C·N taps cannot all be orthogonal. Everything is computed in float64. A dead filter
(`kernels.living_filters`) stays bit-identical and takes part in nothing. K: the filters of a group as rows.

Orthogonal filters: U Vᵀ of the singular value decomposition U Σ Vᵀ of K, after each filter's mean per channel is
subtracted, which takes its response to frequency zero (filters of one tap keep it: nothing else would be left). More
filters than the C·(N − 1) directions that are left are orthogonal only as far as that goes: filters of two or three
taps may then be more alike than before. Singular values below 1e-6 of the largest count as zero. A filter that is
constant in every channel stays as it is.

One pattern each (`dct`): K_i = ‖K_i‖ · u_i ⊗ B_p, with B_p one of the N patterns of the orthonormal DCT-II basis over
the taps and u_i, of length 1, the weights of the channels. Each pattern takes as many filters as any other, those with
the largest share of energy in it first. Filters of other patterns are orthogonal whatever their channels do, and the
u_i of one pattern are made so: U Vᵀ as above, of the filters' own weights in that pattern. Why it works: the summed
power spectrum is flat (exactly so where N divides the number of filters and their norms are equal), which is the most
that lowering Eq. 10 can reach, and kernels are orthogonal as well, which Eq. 10 does not ask for.
- A layer with 3 input channels and more filters than C·N is taken to see photographs, whose channels are correlated by
  about 0.85: the u_i are made orthogonal after whitening by that. Where a pattern has more than 3 filters, 30 steps
  down the gradient of Σ cos⁸ keep two of them from being alike, unless they are duplicates or opposites from the start.
- Any other layer with more filters than C·N would need duplicates, and a filter of one tap has one pattern: these are
  made orthogonal as above (`dct_method`), but filters of two or three taps with their means.

Uncorrelated feature maps on a batch of images, front to back through a network: K ← D G^(−1/2) diag(s)⁻¹ K with s and
G, the standard deviations and the correlation matrix of the layer's feature maps over all images and positions, and D,
which restores each filter's norm. This is the smallest change of the standardized maps that makes them uncorrelated on
these images (ZCA-cor). Stride, dilation and padding need no care, for the maps are the layer's own, and nor does its
bias, which correlation does not see. Eigenvalues of G below 1e-8 of the largest count as zero. A filter whose map does
not vary on the images stays as it is.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from convsim_cli.batch_norm import batch_statistics
from convsim_cli.device import Advance
from convsim_cli.errors import (
    ConvsimError,
    ConvsimWarning,
    InputError,
    describe_tensor,
    is_out_of_memory,
    kind_of,
    model_failed,
)
from convsim_cli.kernels import (
    VANISHED,
    Kernel,
    Patterns,
    Selection,
    living_filters,
    module_kernels,
    overrides_forward,
    undone_on_failure,
    unwrapped,
    warn_of_unsupported,
    weight_of,
)
from convsim_cli.layers import convolve_with, is_empty_call, layers_of, side_effect_free
from convsim_cli.measurement.feature_maps import MapMoments
from convsim_cli.measurement.kernel_figures import are_finite, check_finite, check_range, compare_weights
from convsim_cli.precision import Taps, full_precision
from convsim_cli.similarity import to_filters

SMALLEST_SINGULAR_VALUE = 1e-6  # as a share of the largest
SMALLEST_EIGENVALUE = 1e-8  # as a share of the largest
SMALLEST_SHARE = 1e-12  # of a filter's energy; less of a pattern tells nothing about the channels
CHANNELS = 3  # of a photograph
CHANNEL_CORRELATION = 0.85  # of two of them; CIFAR-10: 0.79 to 0.91
FEW_TAPS = 3  # a filter's mean is too large a part of so few to be taken away from many filters
SPREADING = 30  # steps that keep filters of one pattern apart
_ROUNDING = 1e-8  # rows of U Vᵀ are at most 1 long; one this short lies outside of the directions that count
_CHUNK = 1 << 22  # values of feature maps that are held in float64 at once

# (filters `[groups, S / groups, N, C]` in float64, which of them live `[groups, S / groups]`) → new directions, of any
# length, as rows `[groups, S / groups, N·C]`; a row of zeros for a filter that has none
Directions = Callable[[Tensor, Tensor], Tensor]


def orthogonalize_(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Make the filters of every convolution of a module orthogonal, in place, and return a record per layer.

    The filters of a group, as rows, become U Vᵀ of their singular value decomposition U Σ Vᵀ, each filter's mean per
    channel subtracted first, so that more filters than C·(N − 1), of N taps and C channels, are not quite orthogonal.
    Every filter keeps its norm; dead filters stay bit-identical. include, exclude: globs over names of tensors;
    advance: called with the number of layers done since the last call. A record contains `name`, `shape`, `groups`,
    `assumed` and, under `before` and `after`, `cs`, `ncs` and `norm`. Warns about skipped layers, such as parametrized
    ones, and about a model without kernels. Raises InputError for a pattern that matches nothing and for a kernel with
    NaN or Inf; the model is then untouched.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> record = orthogonalize_(model)[0]
    >>> record["name"], abs(record["after"]["norm"] - record["before"]["norm"]) < 1e-6
    ('0.weight', True)
    """
    return [record for _, record in _change_kernels_(model, orthogonalize_kernel, Patterns(include, exclude), advance)]


def orthogonalize_weight_(weight: Tensor, groups: int = 1) -> Tensor:
    """Make the filters of a weight `[S, C, *taps]` orthogonal, in place, each at its own norm, and return the weight.

    Use it like torch.nn.init. groups: S filters in that many consecutive groups, each orthogonal by itself. Raises
    ValueError for another shape, type or number of groups, and InputError for NaN or Inf. A filter
    that forms no pairs, as in a depthwise layer, loses its means all the same. Formula: `orthogonalize_`.

    >>> rows = nn.functional.normalize(orthogonalize_weight_(torch.randn(8, 4, 3, 3)).flatten(1))
    >>> torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    True
    """
    to_filters(weight, groups)  # raises for what is no weight
    kernel = Kernel("weight", tuple(weight.shape), groups)
    with torch.no_grad():
        return weight.copy_(orthogonalize_kernel(kernel, weight))


def orthogonalize_kernel(kernel: Kernel, weight: Tensor) -> Tensor:
    """Return the orthogonal weight, in the stored shape and dtype, on its device.

    weight: as stored, untouched. Raises InputError for NaN or Inf.
    """
    check_finite([(kernel, weight)])
    return _with_directions(kernel, weight, _orthogonal_directions)


def _orthogonal_directions(filters: Tensor, living: Tensor, with_means: bool = False) -> Tensor:
    keep = with_means or filters.shape[2] == 1
    centered = filters if keep else filters - filters.mean(2, keepdim=True)
    varying = living & (_norms(centered) > VANISHED * _norms(filters))  # what is left of a constant is rounding
    rows = _polar(torch.where(varying[..., None, None], centered, 0).flatten(2))
    present = varying & (torch.linalg.vector_norm(rows, dim=-1) > _ROUNDING)
    return torch.where(present.unsqueeze(-1), rows, 0)


def _polar(rows: Tensor) -> Tensor:
    """Return U Vᵀ, in which singular values that count as zero take no part."""
    if rows.shape[-2] < rows.shape[-1]:
        return _polar(rows.mT).mT  # LAPACK decomposes a tall matrix several times as fast as a wide one
    u, values, vt = torch.linalg.svd(rows, full_matrices=False)
    kept = values > SMALLEST_SINGULAR_VALUE * values[..., :1]
    return (u * kept.unsqueeze(-2)) @ vt


def dct_(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Give each filter of every convolution of a module one pattern of the DCT, in place; return a record per layer.

    A filter K becomes ‖K‖ · u ⊗ B: B is a pattern of the orthonormal DCT-II basis over the taps, u weighs the channels.
    Each pattern takes as many filters as any other. Arguments, records, warnings and errors: as `orthogonalize_`. A
    record also contains `method`: `dct`, or `orthogonal` if that works better: for 1×1 kernels, and for more filters
    than taps times channels, unless there are 3 channels.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3))
    >>> record = dct_(model)[0]
    >>> record["method"], record["after"]["ncs"] < record["before"]["ncs"]
    ('dct', True)
    """
    changed = _change_kernels_(model, dct_kernel, Patterns(include, exclude), advance)
    return [{**record, "method": dct_method(kernel)} for kernel, record in changed]


def dct_weight_(weight: Tensor, groups: int = 1) -> Tensor:
    """Give each filter of a weight `[S, C, *taps]` one pattern of the DCT, in place, at its norm; return the weight.

    groups, errors: as `orthogonalize_weight_`. Warns if filters form no pairs; the weight is then unchanged.

    >>> rows = nn.functional.normalize(dct_weight_(torch.randn(8, 4, 3, 3)).flatten(1))
    >>> torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    True
    """
    to_filters(weight, groups)  # raises for what is no weight
    selection, kernel = Selection(), Kernel("weight", tuple(weight.shape), groups)
    selection.add(kernel)
    if selection.skipped:
        warnings.warn(f"the weight is unchanged: {selection.skipped[0].reason}", ConvsimWarning, stacklevel=2)
        return weight
    with torch.no_grad():
        return weight.copy_(dct_kernel(kernel, weight))


def dct_kernel(kernel: Kernel, weight: Tensor) -> Tensor:
    """Return the weight whose filters are one pattern of the DCT each, in the stored shape and dtype, on its device.

    weight: as stored, untouched. Raises InputError for NaN or Inf.
    """
    check_finite([(kernel, weight)])
    if dct_method(kernel) == "orthogonal":
        orthogonal = partial(_orthogonal_directions, with_means=math.prod(kernel.taps) <= FEW_TAPS)
        return _with_directions(kernel, weight, orthogonal)
    return _with_directions(kernel, weight, partial(_dct_directions, kernel.taps, _sees_photographs(kernel)))


def dct_method(kernel: Kernel) -> Literal["dct", "orthogonal"]:
    """Return which closed form `dct_kernel` gives a layer: `orthogonal` for filters of one tap, or more than C·N."""
    directions = math.prod(kernel.taps) * kernel.channels
    few = kernel.filters <= directions or _sees_photographs(kernel)
    return "dct" if few and not kernel.pointwise else "orthogonal"


def _sees_photographs(kernel: Kernel) -> bool:
    """Whether a layer has more filters than C·N, as first layers have, and the three channels of a photograph."""
    return kernel.channels == CHANNELS and kernel.groups == 1 and kernel.filters > math.prod(kernel.taps) * CHANNELS


def _dct_directions(taps: Taps, photographs: bool, filters: Tensor, living: Tensor) -> Tensor:
    basis = _dct_basis(taps).to(filters.device)
    units = torch.where(living[..., None, None], filters / _norms(filters)[..., None, None], 0)
    weights = basis @ pad(units, (0, 0, 0, 0, 0, 1))  # of channels [groups, S / groups + 1, N, C]; the last is nobody's
    slots = _assign_patterns(weights[:, :-1].square().sum(-1), living)
    group = torch.arange(len(slots), device=slots.device)[:, None, None]
    pattern = torch.arange(len(basis), device=slots.device)[:, None]
    rows = weights[group, slots, pattern]  # [groups, N, filters of one pattern, C]
    rows = torch.where(rows.square().sum(-1, keepdim=True) > SMALLEST_SHARE, rows, 0)
    if photographs:
        rows = rows @ _channel_root(0.5).to(rows.device)
    rows = _orthonormal_rows(normalize(rows, dim=-1), slots < filters.shape[1])
    if photographs:
        rows = _spread(rows) @ _channel_root(-0.5).to(rows.device)
    directions = torch.zeros_like(weights)
    directions[group, slots] = rows.unsqueeze(-2) * basis[:, None, :, None]
    return directions[:, :-1].flatten(2)


def _dct_basis(taps: Taps) -> Tensor:
    """The orthonormal DCT-II basis over the taps as rows `[N, N]`, the mean first."""
    basis = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for k in taps:
        steps = torch.arange(k, dtype=torch.float64, device="cpu")
        waves = (math.pi / k * steps[:, None] * (steps + 0.5)).cos()
        basis = torch.kron(basis, normalize(waves, dim=1))
    return basis


def _assign_patterns(shares: Tensor, living: Tensor) -> Tensor:
    """Return the filters of each pattern `[groups, N, most of one pattern]`, filled up with the number of filters.

    shares: of each filter's energy in each pattern, `[groups, S / groups, N]`. All pairs of filter and pattern are
    taken in falling share. Of S living filters a pattern takes ⌊S/N⌋, and the first S mod N that overflow one more.
    """
    count, patterns = shares.shape[1:]
    most, slots = -(-count // patterns), []
    order = shares.cpu().round(decimals=12).flatten(1)  # equal shares in the order of filters, however they are rounded
    for group, alive in zip(order.argsort(dim=1, descending=True, stable=True), living.cpu(), strict=True):
        waiting = set(alive.nonzero().flatten().tolist())
        taken: list[list[int]] = [[] for _ in range(patterns)]
        each, more = divmod(len(waiting), patterns)
        for number, pattern in (divmod(pair, patterns) for pair in group.tolist()):
            overflows = len(taken[pattern]) == each
            if number in waiting and len(taken[pattern]) <= each and not (overflows and not more):
                taken[pattern].append(number)
                waiting.remove(number)
                more -= overflows
        slots.append([[*members, *[count] * (most - len(members))] for members in taken])
    return torch.tensor(slots, device=shares.device)


def _orthonormal_rows(rows: Tensor, present: Tensor) -> Tensor:
    """Return U Vᵀ of rows `[…, n, C]`, completed by an orthonormal complement where rows are zero or dependent.

    present: which rows there are `[…, n]`; the others are zero, and stay so. Beyond n = C a zero row becomes any row.
    """
    found = _polar(rows)
    missing = present.sum(-1).clamp_max(rows.shape[-1]) - found.square().sum((-2, -1)) > 0.5
    empty = present & (rows == 0).all(-1)
    if not (missing.any() or empty.any()):
        return found
    generator = torch.Generator("cpu").manual_seed(0)
    seeded = torch.randn(rows.shape[-2:], dtype=rows.dtype, generator=generator, device="cpu").to(rows.device)
    free = seeded * present.unsqueeze(-1) - found @ (found.mT @ seeded)  # off the rows' span, on both sides
    free = free - (free @ found.mT) @ found
    found = found + _polar(torch.where(missing[..., None, None], free, 0))
    return torch.where((empty & (found.abs().amax(-1) < _ROUNDING)).unsqueeze(-1), seeded, found)


def _spread(rows: Tensor) -> Tensor:
    """Return rows `[…, n, C]` at length 1, turned apart where n > C: small steps down the gradient of Σ cos⁸."""
    count, channels = rows.shape[-2:]
    rows = normalize(rows, dim=-1)
    for _ in range(SPREADING if count > channels else 0):
        cosines = rows @ rows.mT
        cosines.diagonal(dim1=-2, dim2=-1).zero_()
        rows = normalize(rows - 2 / count * cosines.pow(7) @ rows, dim=-1)
    return rows


def _channel_root(power: float) -> Tensor:
    """The power of the correlation matrix of a photograph's channels: 1 on its diagonal, `CHANNEL_CORRELATION` off."""
    apart, common = 1 - CHANNEL_CORRELATION, 1 + (CHANNELS - 1) * CHANNEL_CORRELATION  # its eigenvalues
    mean = torch.full((CHANNELS, CHANNELS), 1 / CHANNELS, dtype=torch.float64, device="cpu")
    return apart**power * (torch.eye(CHANNELS, dtype=torch.float64, device="cpu") - mean) + common**power * mean


def decorrelate_(
    model: nn.Module,
    images: Tensor,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Make the feature maps of every convolution uncorrelated on a batch of images, in place, front to back.

    images: `[B, C, …]`, as the model takes them and on its device; B × positions should be many times the number of a
    layer's filters, or the maps of other images stay correlated. include, exclude, advance and the records, which come
    in the order of execution: as `orthogonalize_`. With s and G, the standard deviations and the correlation matrix of
    the layer's maps, K ← D G^(−1/2) diag(s)⁻¹ K, where D restores each filter's norm.

    The model runs in evaluation mode, but batch normalization by the statistics of this batch, in two passes and one
    more for each layer that is called several times (its maps are those of all calls, with the layers before it changed
    already). Only the kernels change; modes, buffers, hooks and random number generators do not. Warns about skipped
    layers (parametrized, or without inputs) and about a model without kernels. Raises InputError for a pattern that
    matches nothing, an empty batch, and NaN or Inf in a kernel or a feature map. After any exception the kernels are
    unchanged.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> images = torch.randn(64, 3, 8, 8)
    >>> records = decorrelate_(model, images)
    >>> maps = model(images).transpose(0, 1).flatten(1)
    >>> torch.allclose(maps.corrcoef(), torch.eye(8), atol=1e-4)
    True
    """
    selection = module_kernels(model, Patterns(include, exclude))
    warn_of_unsupported(selection)
    try:
        records = decorrelate_kernels_(model, selection.kernels, images, advance)
    except Exception as error:  # whatever a model's own code raises
        if isinstance(error, ConvsimError) or is_out_of_memory(error):
            raise
        raise model_failed(describe_tensor(images), error) from error
    called = {record["name"] for record in records}
    if uncalled := [kernel.name for kernel in selection.kernels if kernel.name not in called]:
        warnings.warn(f"skipped layers that no inputs reach: {', '.join(uncalled)}", ConvsimWarning, stacklevel=2)
    return records


def decorrelate_kernels_(
    model: nn.Module, kernels: Sequence[Kernel], images: Tensor, advance: Advance | None = None
) -> list[dict[str, Any]]:
    """Do to the given kernels of a model what `decorrelate_` does. Those that no inputs reach have no record."""
    model = unwrapped(model)
    if not isinstance(images, Tensor):
        raise InputError(f"`images` is {kind_of(images)}; expected a batch [B, C, …]")
    if not images.numel():
        raise InputError("`images` is empty; expected a batch of at least one image")
    if not images.is_floating_point() or images.is_meta:
        raise InputError(f"`images` is {describe_tensor(images)}; expected floating images")
    weights = [weight_of(model, kernel) for kernel in kernels]
    check_finite(list(zip(kernels, weights, strict=True)))
    advance = advance or (lambda _: None)
    records: list[dict[str, Any]] = []
    with (
        side_effect_free(model),
        full_precision(images.device),
        batch_statistics(model),
        undone_on_failure(weights),
    ):
        calls: Counter[Kernel] = Counter()  # in the order of first calls
        _run(model, images, kernels, lambda kernel, *_: calls.update([kernel]))
        waiting = list(calls)
        while waiting:
            found = _Pass(waiting, calls, advance).run(model, images)
            records += found
            waiting = waiting[len(found) :]
    advance(len(kernels) - len(records))
    return records


def _run(model: nn.Module, images: Tensor, kernels: Sequence[Kernel], look: Callable[..., None]) -> None:
    """Run a model, and call look(kernel, layer, inputs, options) before each call of a layer of these kernels.

    Calls on nothing, such as those of a mask head where no object was found, are left out.
    """

    def look_at_inputs(kernel: Kernel, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not is_empty_call(inputs, options):
            look(kernel, layer, inputs, options)

    with ExitStack() as hooks:
        for kernel, layer in layers_of(model, kernels):
            hooks.enter_context(layer.register_forward_pre_hook(partial(look_at_inputs, kernel), with_kwargs=True))
        model(images.clone())  # which the model may change


class _Pass:
    """A pass through the network that changes the first of the layers that are waiting, each just before it is called.

    A layer that is called several times is the last that a pass can change: its earlier calls ran with its former
    kernels.
    """

    def __init__(self, waiting: Sequence[Kernel], calls: Counter[Kernel], advance: Advance) -> None:
        self._waiting, self._calls, self._advance = list(waiting), calls, advance
        self._records: list[dict[str, Any]] = []
        self._moments = MapMoments()  # of that layer's maps
        self._seen = 0  # calls of the first layer that is waiting

    def run(self, model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
        """Return the records of the layers that were changed: at least one."""
        _run(model, images, self._waiting, self._look)
        if not self._records:
            kernel = self._waiting[0]
            raise InputError(
                f"{kernel.name}: the model calls this layer {self._calls[kernel]} times, but {self._seen} times once "
                "the layers before it have changed; exclude this layer"
            )
        return self._records

    def _look(self, kernel: Kernel, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._waiting or kernel is not self._waiting[0]:
            return
        if not self._seen:
            self._moments = MapMoments(kernel.groups)
        maps = _maps(layer, inputs, options)
        for chunk in maps.split(max(1, _CHUNK // maps[0].numel())):
            self._moments.update(_in_float64(chunk))
        self._seen += 1
        if self._seen == self._calls[kernel]:
            self._change(kernel, layer.weight)
            self._waiting = self._waiting[1:] if self._seen == 1 else []
            self._seen = 0

    def _change(self, kernel: Kernel, weight: Tensor) -> None:
        before = weight.detach().clone()
        weight.copy_(_with_directions(kernel, before, _decorrelated_directions(kernel, self._moments)))
        self._records += compare_weights([(kernel, before, weight)])
        self._advance(1)


def _maps(layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """A convolution's maps `[images, S, *space]` without its bias, in float32 at least."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)

    may_write = overrides_forward(layer)  # to what it is called with

    def cast(value: Any) -> Any:
        return value.to(dtype, copy=may_write) if isinstance(value, Tensor) else value

    inputs, options = tuple(map(cast, inputs)), {name: cast(value) for name, value in options.items()}
    with full_precision(layer.weight.device):  # the network may switch autocast on by itself
        return convolve_with(layer, layer.weight.detach().to(dtype), inputs, options)


def _decorrelated_directions(kernel: Kernel, moments: MapMoments) -> Directions:
    """Return G^(−1/2) diag(s)⁻¹ K as a function of K. moments: of the layer's maps, in float64."""
    correlation = moments.correlation(dtype=torch.float64)
    spread = moments.variance.sqrt()
    if correlation is None and not are_finite([spread]):
        raise InputError(f"{kernel.name}: its feature maps on these `images` contain NaN or Inf; check the images")
    size = (moments.variance + moments.mean.square()).sqrt()

    def whitened(filters: Tensor, living: Tensor) -> Tensor:
        if correlation is None:  # a single value of each map
            return torch.zeros_like(filters.flatten(2))
        largest = torch.where(living, size / _norms(filters), 0).amax()
        varying = living & (spread > VANISHED * largest * _norms(filters))  # less is rounding of a constant map
        varying &= correlation.diagonal(dim1=-2, dim2=-1) > 0
        inverse = torch.where(varying, 1 / spread, 0)
        root = _inverse_root(correlation * varying.unsqueeze(-1) * varying.unsqueeze(-2))
        rows = (root * inverse.unsqueeze(-2)) @ filters.flatten(2)
        return torch.where(varying.unsqueeze(-1), rows, 0)

    return whitened


def _inverse_root(correlation: Tensor) -> Tensor:
    """Return G^(−1/2), in which eigenvalues that count as zero take no part."""
    values, vectors = torch.linalg.eigh(correlation)
    kept = values > SMALLEST_EIGENVALUE * values[..., -1:]
    roots = torch.where(kept, values, 1).rsqrt() * kept
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT


def _change_kernels_(
    model: nn.Module, form: Callable[[Kernel, Tensor], Tensor], patterns: Patterns, advance: Advance | None
) -> list[tuple[Kernel, dict[str, Any]]]:
    """Give all kernels of a model that the patterns select a closed form, in place, or on failure none of them."""
    selection = module_kernels(model, patterns)
    warn_of_unsupported(selection, stacklevel=4)
    weights = [weight_of(model, kernel).detach() for kernel in selection.kernels]
    found = []
    for kernel, weight in zip(selection.kernels, weights, strict=True):
        found.append(form(kernel, weight))
        if advance:
            advance(1)
    records = compare_weights(list(zip(selection.kernels, weights, found, strict=True)))
    with undone_on_failure(weights):
        for weight, changed in zip(weights, found, strict=True):
            weight.copy_(changed)
    return list(zip(selection.kernels, records, strict=True))


def _with_directions(kernel: Kernel, weight: Tensor, directions: Directions) -> Tensor:
    """Give a weight other directions, each filter at its own norm; in the stored shape and dtype, on its device.

    weight: as stored, finite, untouched. Dead filters, and those without a new direction, stay bit-identical. Raises
    InputError if the stored dtype cannot hold the result.
    """
    filters = _in_float64(kernel.to_filters(weight.detach()))
    living = living_filters(filters)
    rows = directions(filters, living).view_as(filters)
    lengths = _norms(rows)
    scale = torch.where(lengths > 0, _norms(filters) / lengths, 0)
    changed = living & (lengths > 0)
    rows = torch.where(changed[..., None, None], rows * scale[..., None, None], filters)
    found = kernel.to_stored(rows, weight.dtype).to(weight.device)
    check_range(kernel, found)
    return found


def _norms(filters: Tensor) -> Tensor:
    """L2 norms of filters `[groups, S / groups, N, C]`: `[groups, S / groups]`."""
    return torch.linalg.vector_norm(filters, dim=(-2, -1))


def _in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its device if that has float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
