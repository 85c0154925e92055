"""What a step costs: an `init` iteration over ResNet-18, and a `reg` training step of CNN1. Run by hand.

    python tests/benchmarks/step.py

Medians over repetitions run in turn in one process; the ratio is the median over neighbours, and what to quote.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from convsim_cli.experiments.datasets import Dataset, Split
from convsim_cli.experiments.networks import build_network
from convsim_cli.experiments.training import Arguments, Trainer
from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.precision import full_precision
from convsim_cli.similarity import similarity_gradient

CPU = torch.device("cpu")


def interleaved(
    first: Callable[[], object], second: Callable[[], object], repetitions: int
) -> tuple[float, float, float]:
    """Median seconds of either, and the median ratio of neighbours, run in turn after three rounds to warm up."""
    rounds = [(_seconds(first), _seconds(second)) for _ in range(repetitions + 3)][3:]
    ours, other = zip(*rounds, strict=True)
    return median(ours), median(other), median(a / b for a, b in rounds)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def initialisation(repetitions: int = 21) -> tuple[float, float, float]:
    """One `init` iteration over ResNet-18's kernels, and one fused Adam step on the same tensors."""
    model = build_network("resnet18")
    layers = [(k, k.to_filters(weight_of(model, k).detach().clone())) for k in module_kernels(model).kernels]
    optimisers = [torch.optim.Adam([filters.requires_grad_()], lr=1e-3, fused=True) for _, filters in layers]
    for _, filters in layers:
        filters.grad = torch.randn_like(filters)

    def adam() -> None:
        for optimiser in optimisers:
            optimiser.step()

    @torch.no_grad()
    def iteration() -> None:
        with full_precision(CPU):
            for (kernel, filters), optimiser in zip(layers, optimisers, strict=True):
                filters.grad = similarity_gradient(filters, kernel.taps)
                optimiser.step()

    return interleaved(iteration, adam, repetitions)


def training(repetitions: int = 21) -> tuple[float, float, float]:
    """One step of CNN1 at batch 512, with the penalty and without it."""
    split = Split(torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (512,)))
    data = Dataset("noise", split, split, 10, (0.5,) * 3, (0.3,) * 3)
    reg, baseline = (Trainer(build_network("cnn1"), data, Arguments(mode=mode), CPU) for mode in ("reg", "baseline"))
    return interleaved(lambda: reg._train(None), lambda: baseline._train(None), repetitions)


def main() -> None:
    """Print the two ratios, with the milliseconds that they are made of."""
    for name, measure in (
        ("init iteration / Adam step, ResNet-18", initialisation),
        ("reg / baseline step, CNN1", training),
    ):
        ours, other, ratio = measure()
        print(f"{name}: {ratio:.3f} ({1e3 * ours:.1f} ms / {1e3 * other:.1f} ms)")


if __name__ == "__main__":
    main()
