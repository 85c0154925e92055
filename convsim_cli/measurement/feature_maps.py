"""How similar feature maps are, accumulated over inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convsim_cli.kernels import Kernel
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.synthetic_inputs import SIDE, make_inputs

REDUNDANT = 0.95  # mean |cos| above which a filter says what another one says already
_GRAM_ELEMENTS = 1 << 24  # inputs are taken in chunks so that maps and their Gram product stay below this


def probe_kernel(
    kernel: Kernel, weight: Tensor, probe: str = "white", samples: int = 16, side: int | None = None, seed: int = 0
) -> FeatureMapSimilarity:
    """Return the similarity of a layer's maps by itself: inputs of its own channels, stride 1, full padding.

    weight: as stored, on the device to compute on. side: pixels along each axis, 32 for 2-D kernels unless given.
    """
    axes = len(kernel.taps)
    space = (side or SIDE[axes],) * axes
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[axes - 1]
    peak = weight.abs().amax().double().item() or 1.0
    filters = (kernel.to_convolution(weight) / peak).float()  # maps of very large or small kernels leave float32
    padding = tuple(k - 1 for k in kernel.taps)
    similarity = FeatureMapSimilarity(kernel.groups, peak)
    inputs = make_inputs(probe, samples, kernel.channels, space, seed)
    for images in inputs.split(similarity.chunk(kernel.filters, *inputs.shape[2:])):
        with full_precision(weight.device), torch.inference_mode():
            similarity.update(convolve(images.to(weight.device), filters, padding=padding, groups=kernel.groups))
    return similarity


class FeatureMapSimilarity:
    """Running similarity of feature maps over inputs.

    fm_cos: mean over inputs and pairs of |cos(F_i, F_j)|, None at a single output position or without a pair of maps;
    fm_cos_random: what maps of independent normal values give, √(2 / (π·positions)); fm_inner2: the paper's, mean over
    inputs and pairs of ⟨F_i, F_j⟩²; redundant: filters with a partner of mean |cos| above `REDUNDANT`; dead: filters
    whose map is zero on every input. Pairs are i < j within a group; a map that is zero has no angle and is left out of
    the cosines. A layer that is called several times counts them all: those at a single position add nothing to the
    cosines, and `fm_cos_random` is the mean over the others.
    """

    def __init__(self, groups: int = 1, scale: float = 1.0) -> None:
        """Start with nothing seen. scale: what the maps were divided by before they are given to `update`."""
        self.calls = 0
        self._groups, self._scale = groups, scale
        self._inputs = 0
        self._by_pair: Tensor | None = None  # sums over inputs of |cos|, and how many there were
        self._counts: Tensor | None = None
        self._cosines: Tensor | float = 0.0
        self._angles: dict[int, Tensor] = {}  # how many cosines were added up, by number of positions
        self._products: Tensor | float = 0.0
        self._seen: Tensor | None = None

    def chunk(self, filters: int, *space: int) -> int:
        """Return how many inputs to take at once, so that memory stays bounded whatever the layer."""
        positions = 1
        for side in space:
            positions *= side
        return max(1, _GRAM_ELEMENTS // max(filters * filters // self._groups, filters * positions))

    def update(self, maps: Tensor) -> None:
        """Add maps `[inputs, S, *space]`, the convolution's output without its bias. Waits for no device."""
        maps = maps.detach().float().unflatten(1, (self._groups, -1)).flatten(3)
        inputs, _, count, positions = maps.shape
        peak = maps.abs().amax(-1, keepdim=True)  # squares of very small or large maps leave float32's range
        unit = maps / torch.where(peak > 0, peak, 1)
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        unit = unit / torch.where(norm > 0, norm, 1)
        with full_precision(maps.device):
            cosines = unit @ unit.mT
        cosines.diagonal(dim1=-2, dim2=-1).zero_()
        live = (peak > 0).squeeze(-1)
        wide = _wide(maps.device)
        length = (norm.to(wide) * peak.to(wide)).square()
        if positions > 1:
            self._add_cosines(cosines.abs(), live, positions)
        self._products = self._products + (cosines.to(wide).square() * length * length.mT).sum() / 2
        self._inputs += inputs * self._groups * count * (count - 1) // 2
        alive = live.any(0)
        self._seen = alive if self._seen is None else self._seen | alive

    def result(self) -> dict[str, Any]:
        """Return the figures so far; None where no number can be given."""
        counts = {positions: float(count) for positions, count in self._angles.items()}
        angles = sum(counts.values())
        defined = angles > 0
        chance = sum(math.sqrt(2 / (math.pi * positions)) * count for positions, count in counts.items())
        return {
            "fm_cos": finite(float(self._cosines) / angles) if defined else None,
            "fm_cos_random": chance / angles if defined else None,
            "fm_inner2": finite(float(self._products) / self._inputs * self._scale**2 * self._scale**2)
            if self._inputs
            else None,
            "redundant": int((self.matrix().amax(-1) > REDUNDANT).sum()) if defined else None,
            "dead": int((~self._seen).sum()) if self._seen is not None else None,
        }

    def matrix(self) -> Tensor:
        """Return the mean over inputs of |cos(F_i, F_j)|, `[groups, S / groups, S / groups]`, zero on the diagonal.

        Zero as well where two maps were never both alive.
        """
        assert self._by_pair is not None
        assert self._counts is not None
        return self._by_pair / self._counts.clamp_min(1)

    def most_similar(self, count: int) -> list[dict[str, Any]]:
        """Return the most similar pairs of filters, `{"filters": [i, j], "cos": |cos|}`, the most similar first.

        Empty where maps have a single position, or there are none.
        """
        if self._by_pair is None:
            return []
        mean = self.matrix().triu(1)
        values, places = mean.flatten().topk(min(count, mean.numel()))
        each = mean.shape[-1]
        found = []
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            group, pair = divmod(place, each * each)
            if value > 0:
                found.append({"filters": [group * each + pair // each, group * each + pair % each], "cos": value})
        return found

    def _add_cosines(self, cosines: Tensor, live: Tensor, positions: int) -> None:
        """Add |cos| `[inputs, groups, S / groups, S / groups]` of the maps that `live` says are not zero."""
        pairs = live.sum(-1)
        count = (pairs * (pairs - 1)).sum().to(_wide(cosines.device)) / 2
        self._angles[positions] = self._angles[positions] + count if positions in self._angles else count
        self._cosines = self._cosines + cosines.sum(dtype=_wide(cosines.device)) / 2
        by_pair, counts = cosines.sum(0), torch.einsum("bgi,bgj->gij", live.float(), live.float())
        self._by_pair = by_pair if self._by_pair is None else self._by_pair + by_pair
        self._counts = counts if self._counts is None else self._counts + counts


def finite(value: float) -> float | None:
    """Return the value, or None where it is no number: what JSON can say."""
    return value if math.isfinite(value) else None


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
