"""Which synthetic inputs tell most of what a layer does on real images: Spearman's correlation over layers.

    python tests/benchmarks/probes.py --data-dir data [--checkpoint FILE --arch package.module:callable]… [--epochs 8]

Real: `fm_corr`, and `fm_rank` as a share of the filters, of every layer of a network that runs on 256 test images of
CIFAR-10. Synthetic: the same of the file alone, by each of the inputs. Networks: CNNs of this script, with and without
batch normalization, trained on 5,000 images, and the checkpoints that are named.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convsim_cli import measure, measure_checkpoint
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.measurement import synthetic
from convsim_cli.networks.load import open_model_checkpoint

PROBES = ("white", "natural", "relu(natural)", "features")
IMAGES, TRAINED = 256, 5000
Figures = dict[str, tuple[float, float]]  # layer → fm_corr and fm_rank over filters


def network(normalized: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, filters, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1)):
        layers += [nn.Conv2d(channels, filters, 3, stride, 1)]
        layers += [nn.BatchNorm2d(filters), nn.ReLU()] if normalized else [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * len(images.split(64))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for part in order.split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()


def figures(records: list[dict[str, float]]) -> Figures:
    return {str(record["name"]): (record["fm_corr"], record["fm_rank"] / record["filters"]) for record in records}


def probed(path: Path, probe: str) -> Figures:
    """The figures of a file alone. relu(natural) is what `features` is in a file without batch norms."""
    if probe != "relu(natural)":
        return figures(measure_checkpoint(path, input=probe).layers)
    with TemporaryDirectory() as folder:
        tensors = open_model_checkpoint(path).checkpoint
        kept = {name: tensors.load(name) for name in tensors.tensors if "running" not in name}
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, Path(folder) / "m.safetensors")
        return figures(measure_checkpoint(Path(folder) / "m.safetensors", input=synthetic.FEATURES).layers)


def spearman(a: list[float], b: list[float]) -> float:
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="of a network on CIFAR-10")
    parser.add_argument("--arch", action="append", default=[], help="of each checkpoint")
    parser.add_argument("--epochs", type=int, default=8, help="of the script's own networks")
    given = parser.parse_args()
    torch.manual_seed(0)
    data = load_dataset("cifar10", given.data_dir)
    images = data.normalize(data.test.images[:IMAGES]).split(32)
    pooled: dict[str, list[tuple[Figures, dict[str, Figures]]]] = {}
    with TemporaryDirectory() as folder:
        for normalized in (True, False):
            model, path = network(normalized), Path(folder) / f"{normalized}.safetensors"
            train(model, data.normalize(data.train.images[:TRAINED]), data.train.labels[:TRAINED], given.epochs)
            save_file(dict(model.state_dict()), path)
            name = f"6-layer CNN {'with' if normalized else 'without'} batch norm"
            pooled[name] = [(figures(measure(model, images)), {probe: probed(path, probe) for probe in PROBES})]
        for path, arch in zip(given.checkpoint, given.arch, strict=True):
            loaded = open_model_checkpoint(path, arch)
            assert loaded.model is not None
            names = loaded.names or {}
            real = {names.get(n, n): f for n, f in figures(measure(loaded.model, images)).items()}
            pooled.setdefault(arch, []).append((real, {probe: probed(path, probe) for probe in PROBES}))
    print("\t".join(("network", "layers", *(f"{probe}: {what}" for what in ("corr", "rank") for probe in PROBES))))
    for name, networks in pooled.items():
        for inner in (False, True):
            keys = [(index, key) for index, (real, _) in enumerate(networks) for key in list(real)[inner:]]
            cells = [
                spearman(
                    [networks[index][0][key][which] for index, key in keys],
                    [networks[index][1][probe][key][which] for index, key in keys],
                )
                for which in (0, 1)
                for probe in PROBES
            ]
            label = f"{name}{', without the first layer' if inner else ''}"
            print("\t".join((label, str(len(keys)), *(f"{cell:.2f}" for cell in cells))), flush=True)


if __name__ == "__main__":
    main()
