"""What lowers the similarity of feature maps without changing any filter's norm: mean |cos| of one layer's maps.

    python tests/benchmarks/controls.py --data-dir data            # minutes on two cores

The layer is the second of a fresh CNN1, 64×64×3×3, given the inputs of the columns: natural (1/f) and white noise,
full padding, 32×32; and, in the network, what the first layer makes of the first 256 test images of CIFAR-10. Rows: the
filters as they are; each filter's mean over all channels and taps subtracted, or over the taps of each channel; the
closed forms, `decorrelate` on the first 1,024 training images; the objectives, 500 iterations of Adam at 0.001. Each
filter has its fresh norm in every row. With several seeds (fresh weights), mean and standard deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from torch import Tensor, nn

from convsim_cli.closed_forms import decorrelate_, orthogonalize_weight_
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.kernels import Kernel
from convsim_cli.measurement.kernel_figures import kernel_cosine, measure_weight
from convsim_cli.measurement.network import fm_cos_by_layer
from convsim_cli.measurement.synthetic import LayerProbe
from convsim_cli.minimize import minimize_weight_
from convsim_cli.networks.architectures import build_network
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.training.prepare import IMAGES

NAME = "4.weight"  # CNN1's second convolution
TESTED = 256  # images
COLUMNS = ("natural", "white", "real", "ncs", "kernel_cos")
Change = Callable[[nn.Module, Tensor], object]  # of a network's second layer, given the images to decorrelate on


def controls() -> Iterator[tuple[str, Change]]:
    """What is done to the layer, by name."""
    yield "fresh", lambda *_: None
    yield "mean of each filter subtracted", lambda model, _: subtract_mean_(weight_of(model), (1, 2, 3))
    yield "mean of each channel subtracted", lambda model, _: subtract_mean_(weight_of(model), (2, 3))
    yield "orthogonal", lambda model, _: orthogonalize_weight_(weight_of(model))
    yield "decorrelate", decorrelate
    for name in OBJECTIVES:
        yield f"norm-preserving {name}", partial(minimize, objective=name)
    yield "norm-preserving cs, then decorrelate", minimize_and_decorrelate


def weight_of(model: nn.Module) -> Tensor:
    return dict(model.named_parameters())[NAME].detach()


def subtract_mean_(weight: Tensor, axes: tuple[int, ...]) -> None:
    """Subtract means, and give each filter the norm that it had."""
    norms = weight.flatten(1).norm(dim=1)
    weight -= weight.mean(axes, keepdim=True)
    weight *= (norms / weight.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)


def minimize(model: nn.Module, _: Tensor, objective: str = "cs") -> None:
    minimize_weight_(weight_of(model), preserve_norm=True, objective=objective)


def decorrelate(model: nn.Module, images: Tensor) -> None:
    decorrelate_(model, images, include=[NAME])


def minimize_and_decorrelate(model: nn.Module, images: Tensor) -> None:
    minimize(model, images)
    decorrelate(model, images)


def measure(model: nn.Module, images: Tensor) -> list[float | None]:
    """The figures of `COLUMNS`."""
    weight = weight_of(model)
    kernel = Kernel(NAME, tuple(weight.shape))
    probed = [LayerProbe(name).fm_cos(kernel, weight) for name in ("natural", "white")]
    return [
        *probed,
        fm_cos_by_layer(model, images)[NAME],
        measure_weight(kernel, weight)["ncs"],
        kernel_cosine(kernel, weight),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is")
    parser.add_argument("--seeds", type=int, default=3, help="fresh networks, from seed 0 on")
    given = parser.parse_args()
    data = load_dataset("cifar10", given.data_dir)
    train, test = (data.normalize(split.images[:n]) for split, n in ((data.train, IMAGES), (data.test, TESTED)))
    print("\t".join(("filters", *COLUMNS)))
    for name, change in controls():
        found = []
        for seed in range(given.seeds):
            model = build_network("cnn1", seed=seed)
            change(model, train)
            found.append(measure(model, test))
        print("\t".join((name, *(spread(column) for column in zip(*found, strict=True)))), flush=True)


def spread(values: tuple[float, ...]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
