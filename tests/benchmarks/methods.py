"""Value and gradient of L_CS against the other objectives, per layer and over whole networks.

    python tests/benchmarks/methods.py            # layers of all widths, then networks

Each column is seconds of that method over seconds of L_CS, in the same round: above 1, L_CS is faster.
literal: Eq. 10 by conv2d, filter by filter; neighbours, kernel, ocnn, srip, orthoreg: convsim's own objectives of these
names, as `train --mode reg` computes them; floor: copy_ of the kernels, and again of what was copied: the least that
any method has to read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timing import arguments, interleave, report
from torch import Tensor, nn

from convsim_cli.objectives import OBJECTIVES
from convsim_cli.precision import BY_NAME, full_precision
from convsim_cli.similarity import to_filters

LAYERS = (
    *((s, s, 3, 3) for s in (64, 128, 256, 512)),
    (128, 64, 3, 3),
    (256, 128, 3, 3),
    (512, 256, 3, 3),
    (64, 3, 7, 7),
    (64, 3, 11, 11),
    (512, 512, 1, 1),
    (96, 1, 7, 7),
    (96, 1, 31, 31),
)
NETWORKS = ("cnn1", "resnet18", "resnet50", "mobilenet_v3_large", "convnext_tiny")
LITERAL_WORK = 3e9  # multiplications above which the literal equation is left out


def kernels_of(network: str) -> list[Tensor]:
    """The dense kernels of a network, and depthwise ones as if their channels saw one input."""
    from convsim_cli.networks.architectures import build_network

    if network in ("cnn1", "resnet18"):
        model = build_network(network)
    else:
        import torchvision.models

        model = getattr(torchvision.models, network)()
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d)]


def value_and_gradient(weights: Sequence[Tensor], name: str) -> Callable[[], object]:
    """An objective and its gradient, which share what both need, in the layout in which `init` keeps kernels."""
    layers = [to_filters(weight) for weight in weights]
    objective = BY_NAME[name]

    @torch.no_grad()
    def run() -> None:
        with full_precision(layers[0][0].device):
            for filters, taps in layers:
                _, shared = objective.value(filters, taps)
                objective.gradient(filters, shared, taps)

    return run


def by_autograd(weights: Sequence[Tensor], value: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    leaves = [weight.clone().requires_grad_() for weight in weights]

    def run() -> None:
        for leaf in leaves:
            torch.autograd.grad(value(leaf), leaf)

    return run


def literal(weight: Tensor) -> Tensor:
    """Eq. 10: every channel of every filter with every channel of every later one."""
    s, c, h, w = weight.shape
    total = weight.new_zeros(())
    for i in range(s - 1):
        rest = weight[i + 1 :].reshape(-1, 1, h, w)
        maps = nn.functional.conv2d(rest, weight[i].reshape(c, 1, h, w), padding=(h - 1, w - 1))
        total = total + maps.square().sum()
    return total


def floor(weights: Sequence[Tensor]) -> Callable[[], object]:
    copies = [(weight.clone(), weight.clone()) for weight in weights]

    def run() -> None:
        for weight, (first, second) in zip(weights, copies, strict=True):
            first.copy_(weight)
            second.copy_(first)

    return run


def is_small(weight: Tensor) -> bool:
    s, c, h, w = weight.shape
    return s * s / 2 * c * c * (2 * h - 1) * (2 * w - 1) * h * w < LITERAL_WORK


def methods(weights: list[Tensor]) -> dict[str, Callable[[], object]]:
    others = [name for name in OBJECTIVES if name != "cs"]
    return {
        "L_CS": value_and_gradient(weights, "cs"),
        **{name: value_and_gradient(weights, name) for name in others},
        "floor": floor(weights),
    }


def main() -> None:
    given = arguments(__doc__ or "")
    cases = [("×".join(map(str, shape)), [torch.randn(shape)]) for shape in LAYERS]
    cases += [(name, kernels_of(name)) for name in NETWORKS]
    columns = ["what", "L_CS_ms", "literal", *(name for name in OBJECTIVES if name != "cs"), "floor"]
    with report(given, columns) as add:
        for name, weights in cases:
            weights = [weight.to(given.device) for weight in weights]
            found = interleave(methods(weights), given.device, given.repetitions)
            ratio = {key: timing.ratio for key, timing in found.items()}
            if len(weights) == 1 and is_small(weights[0]):  # by itself: it takes seconds, and would thin out the others
                pair = {"L_CS": value_and_gradient(weights, "cs"), "literal": by_autograd(weights, literal)}
                ratio["literal"] = interleave(pair, given.device, 3)["literal"].ratio
            add([name, 1e3 * found["L_CS"].seconds, *(ratio.get(column) for column in columns[2:])])


if __name__ == "__main__":
    main()
