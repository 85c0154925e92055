"""What files tell of public networks, compared with their modules: `python tests/benchmarks/zoo.py [EVERY [LIBRARY]]`.

Builds networks without memory (device meta), and gives names and shapes alone to the guess: once in the modules' order,
as pickles keep it, and once in the alphabet's, as safetensors files do. Networks whose names and shapes all equal those
of one before are left out; of transformers, where a class differs from another by its head alone, those whose
convolutions do. EVERY: take only each EVERY-th network; LIBRARY: timm, torchvision or transformers, all for none.

A layer is right where its groups and transposition are the module's, or where it has no pairs and is left out; doubted
where a warning is about it; wrong in silence otherwise. A quarter to half an hour on one core.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from convsim_cli.kernels import Kernel, TensorInfo, file_kernels, is_convolution, natural_order

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Infos = dict[str, TensorInfo]


def networks(every: int, library: str) -> Iterator[tuple[str, Infos, dict[str, Kernel]]]:
    """Yield each distinct network: its name, its tensors, and its convolutions as the modules have them."""
    known: set[object] = set()
    builders = {name: build for source in SOURCES for name, build in source() if name.startswith(library)}
    for name, build in list(builders.items())[::every]:
        try:
            with torch.device("meta"):
                model = build()
        except Exception as error:  # initialization that reads values, a package that is missing, a config without it
            print(f"{name}: not built ({' '.join(str(error).split())[:60]})", file=sys.stderr)
            continue
        state = model.state_dict()
        infos = {key: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in state.items()}
        modules = {f"{path}.weight": layer for path, layer in model.named_modules() if is_convolution(layer)}
        layers = {key: layer for key, layer in modules.items() if key in infos}
        truth = {k: Kernel(k, infos[k].shape, m.groups, isinstance(m, TRANSPOSED)) for k, m in layers.items()}
        itself: object = tuple(infos.items())
        if name.startswith("transformers"):
            itself = tuple((kernel.shape, kernel.groups, kernel.transposed) for kernel in truth.values())
        if itself not in known and modules:
            known.add(itself)
            yield name, infos, truth


Builders = Iterator[tuple[str, Callable[[], nn.Module]]]


def of_timm() -> Builders:
    import timm

    for name in timm.list_models():
        yield f"timm:{name}", partial(timm.create_model, name)


def of_torchvision() -> Builders:
    import torchvision

    for name in torchvision.models.list_models():
        backbone = {"weights_backbone": None} if "rcnn" in name or name.startswith(DETECTORS) else {}
        yield f"torchvision:{name}", partial(torchvision.models.get_model, name, weights=None, **backbone)


def of_transformers() -> Builders:
    """Yield every public network, under its default configuration, whose own code has a convolution."""
    if find_spec("transformers") is None:
        return
    import transformers

    for path in sorted(Path(transformers.__path__[0]).glob("models/*/modeling_*.py")):
        if "nn.Conv" not in path.read_text():
            continue
        try:
            module = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError as error:
            print(f"{path.name}: not built ({error})", file=sys.stderr)
            continue
        for name in getattr(module, "__all__", []):
            made = getattr(module, name)
            if issubclass(made, nn.Module) and getattr(made, "config_class", None):
                yield f"transformers:{name}", lambda made=made: made(made.config_class())


SOURCES = (of_timm, of_torchvision, of_transformers)
DETECTORS = ("deeplab", "fcn", "lraspp", "fcos", "retinanet", "ssd")


def main() -> None:
    warnings.simplefilter("ignore")
    rows = {order: dict.fromkeys(ROWS, 0) for order in ("modules", "alphabet")}
    for name, infos, truth in networks(int((sys.argv[1:] or ["1"])[0]), "".join(sys.argv[2:])):
        for order, row in rows.items():
            listed = list(infos) if order == "modules" else sorted(infos, key=natural_order)
            found = file_kernels({key: infos[key] for key in listed})
            taken = {kernel.name: (kernel.groups, kernel.transposed) for kernel in found.kernels}
            left_out = {entry.name: entry.reason for entry in found.skipped}
            right, wrong = 0, []
            for key, kernel in truth.items():
                as_module = taken.get(key) == (kernel.groups, kernel.transposed)
                said = "several axes" if "by `include`" in left_out.get(key, "") else left_out.get(key, "")
                listed_so = key not in taken and (not kernel.pairs or said == "several axes" or "1×1 layer" in said)
                if as_module or listed_so:
                    right += 1
                elif key not in found.doubts:
                    wrong.append(key)
            row["networks"] += 1
            row["layers right"] += right
            row["layers doubted"] += len(found.doubts)
            row["layers wrong in silence"] += len(wrong)
            row["networks read right"] += right == len(truth)
            row["of these with a doubt"] += right == len(truth) and bool(found.guess_warnings)
            if wrong:
                print(f"{name}, order of the {order}: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    for title in ROWS:
        print(f"{title:28}{rows['modules'][title]:>10}{rows['alphabet'][title]:>10}")


ROWS = (
    *("networks", "layers right", "layers doubted", "layers wrong in silence"),
    *("networks read right", "of these with a doubt"),
)

if __name__ == "__main__":
    main()
