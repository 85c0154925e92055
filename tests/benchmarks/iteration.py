"""One full `init` iteration (value, gradient, optimizer) against torch's fused Adam step alone on the same tensors.

python tests/benchmarks/iteration.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import arguments, interleave, report

from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.machine.cuda_graphs import repeated
from convsim_cli.machine.precision import full_precision
from convsim_cli.minimize import Minimization, _optimizer, project_, rescale_
from convsim_cli.networks.names import build_network
from convsim_cli.similarity import similarity_gradient


def steps(network: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """An Adam step over a network's kernels, an iteration of either objective, and an iteration's gradients alone."""
    model = build_network(network).to(device)
    layers = [(k, k.to_filters(weight_of(model, k).detach().clone())) for k in module_kernels(model).kernels]
    optimizers = [_optimizer(filters.requires_grad_(), Minimization()) for _, filters in layers]
    norms = [torch.linalg.vector_norm(filters.detach(), dim=(-2, -1), keepdim=True) for _, filters in layers]
    for _, filters in layers:
        filters.grad = torch.randn_like(filters)

    def adam() -> None:
        for optimizer in optimizers:
            optimizer.step()

    @torch.no_grad()
    def iteration(how: Minimization) -> None:
        with full_precision(device):
            for (kernel, filters), optimizer, norm in zip(layers, optimizers, norms, strict=True):
                gradient = similarity_gradient(filters, kernel.taps, out=filters.grad)
                if how.preserve_norm:
                    project_(gradient, filters, norm)
                optimizer.step()
                if how.preserve_norm:
                    rescale_(filters, norm)

    return {
        "Adam": adam,
        "raw": repeated(lambda: iteration(Minimization()), device),
        "norm-preserving": repeated(lambda: iteration(Minimization(preserve_norm=True)), device),
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
