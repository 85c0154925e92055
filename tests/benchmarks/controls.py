"""What lowers the similarity of feature maps without changing any filter's norm, and how long it takes.

    python tests/benchmarks/controls.py --data-dir data            # half an hour on one core

The layers are the second of a fresh CNN1, 64×64×3×3, and its first, 64×3×3×3. Columns: mean |cos| of two maps of one
input (`fm_cos`); and over all inputs and positions, centred, the mean |correlation| (`fm_corr`), the effective rank of
the correlation matrix (`fm_rank`) and the pairs of maps above 0.95 (`pairs`). Inputs: natural (1/f) and white noise,
full padding, 32×32; and, in the network, what a layer sees of the first 256 test images of CIFAR-10 (real). Then the
figures of the kernels alone, and the seconds that the method took.

Rows: the filters as they are; each filter's mean over all channels and taps subtracted, or over the taps of each
channel; the closed forms, `decorrelate` on the first 1,024 training images; the objectives, 500 iterations of Adam at
0.001. Each filter has its fresh norm in every row. With several seeds (fresh weights), mean and standard deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, normalize

from convsim_cli.batch_norm import batch_statistics
from convsim_cli.closed_forms import dct_weight_, decorrelate_, orthogonalize_weight_
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.kernels import Kernel
from convsim_cli.layers import side_effect_free
from convsim_cli.measurement.kernel_figures import kernel_cosine, measure_weight
from convsim_cli.measurement.pairs import THRESHOLD, effective_rank
from convsim_cli.measurement.synthetic import make_inputs
from convsim_cli.minimize import minimize_weight_
from convsim_cli.networks.architectures import build_network
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.training.prepare import IMAGES

SECOND, FIRST = "4", "0"  # CNN1's layers
TESTED = 256  # images
Change = Callable[[nn.Module, str, Tensor], object]  # of a network's layer, given the images to decorrelate on


def controls() -> Iterator[tuple[str, Change]]:
    """What is done to the layer, by name."""
    yield "fresh", lambda *_: None
    yield "mean of each filter subtracted", lambda model, layer, _: subtract_mean_(weight_of(model, layer), (1, 2, 3))
    yield "mean of each channel subtracted", lambda model, layer, _: subtract_mean_(weight_of(model, layer), (2, 3))
    yield "orthogonal", lambda model, layer, _: orthogonalize_weight_(weight_of(model, layer))
    yield "dct", lambda model, layer, _: dct_weight_(weight_of(model, layer))
    yield "decorrelate", decorrelate
    for name in OBJECTIVES:
        yield f"norm-preserving {name}", partial(minimize, objective=name)
    yield "norm-preserving cs, then decorrelate", minimize_and_decorrelate


def weight_of(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight").detach()


def subtract_mean_(weight: Tensor, axes: tuple[int, ...]) -> None:
    """Subtract means, and give each filter the norm that it had."""
    norms = weight.flatten(1).norm(dim=1)
    weight -= weight.mean(axes, keepdim=True)
    weight *= (norms / weight.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)


def minimize(model: nn.Module, layer: str, _: Tensor, objective: str = "cs") -> None:
    minimize_weight_(weight_of(model, layer), preserve_norm=True, objective=objective)


def decorrelate(model: nn.Module, layer: str, images: Tensor) -> None:
    decorrelate_(model, images, include=[f"{layer}.weight"])


def minimize_and_decorrelate(model: nn.Module, layer: str, images: Tensor) -> None:
    minimize(model, layer, images)
    decorrelate(model, layer, images)


def measure(model: nn.Module, layer: str, images: Tensor) -> dict[str, float | None]:
    """The figures of a layer, by column."""
    weight = weight_of(model, layer)
    kernel = Kernel(layer, tuple(weight.shape))
    noise = {name: make_inputs(name, 16, kernel.channels, (32, 32)) for name in ("natural", "white")}
    maps = {name: conv2d(inputs, weight, padding=2) for name, inputs in noise.items()}
    maps["real"] = conv2d(inputs_of(model, layer, images), weight, padding=2)
    correlation = {name: maps[name].double().transpose(0, 1).flatten(1).corrcoef() for name in ("natural", "real")}
    off = {name: upper_triangle(matrix).abs() for name, matrix in correlation.items()}
    return {
        **{f"fm_cos {name}": cosine(found) for name, found in maps.items()},
        **{f"fm_corr {name}": found.mean().item() for name, found in off.items()},
        "fm_rank real": effective_rank(correlation["real"].unsqueeze(0)),
        "pairs real": float((off["real"] > THRESHOLD).sum()),
        "ncs": measure_weight(kernel, weight)["ncs"],
        "kernel_cos": kernel_cosine(kernel, weight),
    }


def inputs_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a layer of a network sees of a batch of images."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.extend(inputs)

    with side_effect_free(model), batch_statistics(model):
        handle = model.get_submodule(layer).register_forward_pre_hook(look)
        model(images)
        handle.remove()
    return seen[0]


def cosine(maps: Tensor) -> float:
    """Mean over inputs and pairs of |cos|."""
    directions = normalize(maps.double().flatten(2), dim=-1)
    return upper_triangle(directions @ directions.mT).abs().mean().item()


def upper_triangle(matrices: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrices.shape[-2:], offset=1)
    return matrices[..., rows, columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is")
    parser.add_argument("--seeds", type=int, default=3, help="fresh networks, from seed 0 on")
    given = parser.parse_args()
    data = load_dataset("cifar10", given.data_dir)
    train, test = (data.normalize(split.images[:n]) for split, n in ((data.train, IMAGES), (data.test, TESTED)))
    for layer in (SECOND, FIRST):
        for row, (name, change) in enumerate(controls()):
            found = []
            for seed in range(given.seeds):
                model = build_network("cnn1", seed=seed)
                start = perf_counter()
                change(model, layer, train)
                seconds = perf_counter() - start
                found.append({**measure(model, layer, test), "seconds": seconds})
            if not row:
                print("\t".join((f"layer {layer}", *found[0])))
            columns = zip(*(figures.values() for figures in found), strict=True)
            print("\t".join((name, *map(spread, columns))), flush=True)


def spread(values: tuple[float, ...]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
