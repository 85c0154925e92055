"""What training costs: the penalty in a step, and `train` against loops that one would write oneself.

    python tests/benchmarks/training.py

On noise in the shape of CIFAR-10: batches of 512 for CNN1, of 128 for ResNet-18. A bare loop indexes resident,
normalized float tensors and does nothing else; the DataLoader script normalizes image by image in worker processes.
On the CPU all of them run with the allocator set as `convsim train` sets it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import arguments, interleave, report
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Images

from convsim_cli.device import keep_freed_memory
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.networks.architectures import build_network
from convsim_cli.training.config import Arguments
from convsim_cli.training.trainer import Trainer

WORKERS = 2


def noise(train: int, test: int | None = None) -> Dataset:
    """Return so many images for training and for testing, as many for both unless given."""
    splits = (
        Split(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (count,)))
        for count in (train, test or train)
    )
    return Dataset("noise", *splits, 10, (0.5,) * 3, (0.3,) * 3)


def trained(arch: str, mode: str, batch: int, data: Dataset, device: torch.device) -> Callable[[], object]:
    trainer = Trainer(build_network(arch), data, Arguments(mode=mode, batch_size=batch), device)
    return lambda: trainer.train_batches(None)


def bare(arch: str, batch: int, data: Dataset, device: torch.device) -> Callable[[], object]:
    """The loop of any tutorial over float tensors that lie on the device."""
    images, labels = data.normalize(data.train.images).to(device), data.train.labels.to(device)
    model, optimizer = _model(arch, device)

    def run() -> None:
        for indices in torch.randperm(len(labels), device=device).split(batch):
            _step(model, optimizer, images[indices], labels[indices])

    return run


class Normalized(Images[tuple[torch.Tensor, int]]):
    """Images one at a time, as torchvision's datasets and transforms give them."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data.normalize(self.data.train.images[index : index + 1])[0], int(self.data.train.labels[index])


def loader(arch: str, batch: int, data: Dataset, device: torch.device) -> Callable[[], object]:
    """The usual script: a DataLoader with worker processes, which stay alive from one pass to the next."""
    batches = DataLoader(Normalized(data), batch, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    model, optimizer = _model(arch, device)

    def run() -> None:
        for images, labels in batches:
            _step(model, optimizer, images.to(device, memory_format=torch.channels_last), labels.to(device))

    return run


def _model(arch: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_network(arch).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train(), torch.optim.SGD(model.parameters(), 0.01)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    given = arguments(__doc__ or "")
    if given.device.type == "cpu":
        keep_freed_memory()
    columns = ["network", "batch", *(f"{name}_images/s" for name in ("train", "reg", "bare", "DataLoader"))]
    columns += ["reg/baseline step", "train/bare images/s", "train/DataLoader images/s"]
    with report(given, columns) as add:
        for arch, batch in (("cnn1", 512), ("resnet18", 128)):
            data = noise(2 * batch)
            found = interleave(
                {
                    "train": trained(arch, "baseline", batch, data, given.device),
                    "reg": trained(arch, "reg", batch, data, given.device),
                    "bare": bare(arch, batch, data, given.device),
                    "DataLoader": loader(arch, batch, data, given.device),
                },
                given.device,
                given.repetitions,
            )
            images = [2 * batch / timing.seconds for timing in found.values()]
            add([arch, batch, *images, *(found[name].ratio for name in ("reg", "bare", "DataLoader"))])


if __name__ == "__main__":
    main()
