"""What `measure` and the other library calls do with wrapped, offloaded, scripted and stateful models."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convsim_cli import ConvSimPenalty, TurnMonitor, dct_, decorrelate_, measure, minimize_, orthogonalize_
from convsim_cli.batch_norm import reestimate_statistics
from convsim_cli.errors import InputError
from convsim_cli.measurement.network import fm_corr_by_layer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "both": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),  # type: ignore
    "both, the other way round": lambda model: nn.parallel.DistributedDataParallel(
        torch.compile(model, backend="eager")  # type: ignore[arg-type]
    ),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_the_module_inside(wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = network(), torch.randn(4, 3, 12, 12)
    expected, names = measure(model, images), ["0.weight", "3.weight"]
    wrapped = WRAPPERS[wrapper](model)
    for kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        monkeypatch.setattr(kind, "forward", lambda *_, **__: pytest.fail("waits for the other processes"))
    assert measure(wrapped, images) == expected
    assert list(fm_corr_by_layer(wrapped, images)) == names
    assert ConvSimPenalty(wrapped)().item() == ConvSimPenalty(model)().item()
    assert [row["layer"] for row in TurnMonitor(wrapped).rows()] == names
    for change in (orthogonalize_, dct_, lambda m: decorrelate_(m, images), lambda m: minimize_(m, 2)):
        assert [record["name"] for record in change(wrapped)] == names


class Drawing(nn.Module):
    """Counts in buffers of its own, of a parametrization and of a child, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.own = torch.Generator().manual_seed(7)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("largest", None)
        nn.utils.parametrize.register_parametrization(self.layer, "weight", Counting())

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.largest = images.max() if self.largest is None else torch.maximum(self.largest, images.max())
        noise = torch.rand(1) + random.random() + np.random.rand() + torch.rand(1, generator=self.own)
        maps: Tensor = self.layer(images + noise)
        return maps


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("looks", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.looks.add_(1)
        return 2 * weight


def test_no_buffer_and_no_generator_notices_a_measurement() -> None:
    model, images = Drawing(), torch.randn(2, 3, 8, 8)

    def state() -> list[Any]:
        generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return [*generators, model.own.get_state().tolist(), copy.deepcopy(dict(model.named_buffers()))]

    before = state()
    for call in (lambda: measure(model, [images, images]), lambda: fm_corr_by_layer(model, images)):
        call()
        assert state() == before


@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_the_default_device_plays_no_part(default: str) -> None:
    model, images = network(), torch.randn(16, 3, 12, 12)
    plain = copy.deepcopy(model)

    def results(model: nn.Module) -> list[Any]:
        penalty = ConvSimPenalty(model, "expected")
        penalty.add_gradient_(0.1)
        gradients = [parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None]
        found = [measure(model, images), gradients, penalty.value().item(), TurnMonitor(model).rows()]
        reestimate_statistics(model, images.split(8))
        for change in (lambda: minimize_(model, 2), lambda: decorrelate_(model, images), lambda: dct_(model)):
            found.append(change())
        found += [minimize_(model, 2, objective=name) for name in ("ocnn", "srip", "orthoreg", "neighbours", "kernel")]
        return [*found, orthogonalize_(model), measure(model, images)]

    expected = results(plain)
    torch.set_default_device(default)
    try:
        assert results(model) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: measure(model, torch.zeros(2, 3, 12, 12)),
        lambda model: minimize_(model, 1),
        dct_,
        orthogonalize_,
        lambda model: decorrelate_(model, torch.zeros(2, 3, 12, 12)),
        lambda model: ConvSimPenalty(model).add_gradient_(1.0),
    ],
)
@pytest.mark.parametrize("part", [0, 3, None])
def test_weights_without_values_are_refused_by_name(call: Callable[[nn.Module], object], part: int | None) -> None:
    model = network()
    (model if part is None else model[part]).to("meta")
    with pytest.raises(InputError, match=rf"^{part or 0}\.weight is on the meta device and has no values"):
        call(model)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:convsim skips")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 12, 12))])
def test_scripted_models_are_refused_and_scripted_parts_left_out(make: Callable[[nn.Module], nn.Module]) -> None:
    images = torch.randn(2, 3, 12, 12)
    for call in (measure, decorrelate_, lambda model, _: minimize_(model, 1)):
        with pytest.raises(InputError, match=r"^the model is scripted or traced"):
            call(make(network().eval()), images)
    model = nn.Sequential(make(network().eval()), nn.Conv2d(4, 5, 3))
    for call in (measure, decorrelate_):
        with pytest.warns(UserWarning, match=r"0\.0\.weight, 0\.3\.weight \(scripted or traced"):
            assert [record["name"] for record in call(model, images)] == ["1.weight"]


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning", "ignore:.*NO_SHARD:FutureWarning")
@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused_before_it_waits_for_others() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(FullyShardedDataParallel(nn.Conv2d(3, 8, 3), device_id=torch.device("cpu")))
    with pytest.raises(InputError, match="`model` is sharded"):
        measure(model, torch.randn(2, 3, 12, 12))
