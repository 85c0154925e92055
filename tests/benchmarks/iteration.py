"""One full `init` iteration (value, gradient, optimizer) against torch's fused Adam step alone on the same tensors.

python tests/benchmarks/iteration.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import arguments, interleave, report

from convsim_cli.device import repeated
from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.minimize import Minimization, Stack, batch_layers, group_by_shape, make_iteration
from convsim_cli.networks.architectures import build_network
from convsim_cli.precision import full_precision

Step = Callable[[], None]


def steps(network: str, device: torch.device) -> dict[str, Step]:
    """An Adam step over each of a network's kernels by itself, and an iteration of either objective."""
    model = build_network(network).to(device)
    layers = [(kernel, weight_of(model, kernel).detach()) for kernel in module_kernels(model).kernels]
    copies = [torch.randn_like(weight) for _, weight in layers]
    optimizers = [torch.optim.Adam([copy], fused=True, capturable=device.type == "cuda") for copy in copies]
    for copy in copies:
        copy.grad = torch.randn_like(copy)

    def adam() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def iterations(how: Minimization) -> Step:
        stacks = [Stack(*zip(*group, strict=True)) for batch in batch_layers(layers) for group in group_by_shape(batch)]
        together = [[stack] for stack in stacks] if device.type == "cpu" else [stacks]
        each = [repeated(make_iteration(group, how), device) for group in together]

        @torch.no_grad()
        def all_once() -> None:
            with full_precision(device):
                for iterate in each:
                    iterate()

        return all_once

    return {
        "Adam": repeated(adam, device),
        "raw": iterations(Minimization()),
        "norm-preserving": iterations(Minimization(preserve_norm=True)),
    }


def main() -> None:
    given = arguments(__doc__ or "")
    columns = ["network", "Adam_ms", "raw_ms", "norm-preserving_ms", "raw/Adam", "norm-preserving/Adam"]
    with report(given, columns) as add:
        for network in ("cnn1", "resnet18"):
            found = interleave(steps(network, given.device), given.device, given.repetitions)
            milliseconds = [1e3 * timing.seconds for timing in found.values()]
            add([network, *milliseconds, found["raw"].ratio, found["norm-preserving"].ratio])


if __name__ == "__main__":
    main()
