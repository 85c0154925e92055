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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from convsim_cli import (
    ConvSimPenalty,
    TurnMonitor,
    convolutional_similarity,
    dct_,
    decorrelate_,
    measure,
    minimize_,
    orthogonalize_,
)
from convsim_cli.batch_norm import reestimate_statistics
from convsim_cli.errors import ConvsimWarning, InputError
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


def test_a_model_that_changes_its_images_is_measured_as_one_that_does_not() -> None:
    class Shifted(nn.Module):
        def __init__(self, layers: nn.Module, in_place: bool) -> None:
            super().__init__()
            self.layers, self.in_place = layers, in_place

        def forward(self, images: Tensor) -> Tensor:
            return self.layers(images.sub_(0.5).relu_() if self.in_place else images.sub(0.5).relu())

    layers = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    images = torch.rand(8, 3, 12, 12)
    before, twin = images.clone(), copy.deepcopy(layers)
    assert measure(Shifted(layers, True), images) == measure(Shifted(layers, False), images)
    decorrelate_(Shifted(layers, True), images)
    decorrelate_(Shifted(twin, False), images)
    assert torch.equal(layers[0].weight, twin[0].weight)
    assert torch.equal(images, before)


def test_what_a_model_keeps_in_attributes_is_as_it_was() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.size = nn.Conv2d(3, 4, 3, padding=1), 0
            self.register_buffer("table", torch.empty(0))

        def forward(self, images: Tensor) -> Tensor:
            if self.size != images.shape[-1]:
                self.size = images.shape[-1]
                self.table = torch.ones(self.size)
            return self.layer(images) + self.table

    model = Cached()
    model(torch.randn(2, 3, 8, 8))
    measure(model, torch.randn(2, 3, 16, 16))
    assert model.size == len(model.table) == 8
    model(torch.randn(2, 3, 16, 16))


def test_an_embedding_of_bounded_norm_is_as_it_was() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.embedding = nn.Conv2d(3, 4, 3), nn.Embedding(2, 4, max_norm=0.1)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images) + self.embedding(torch.zeros(len(images), dtype=torch.long))[..., None, None]

    model = Conditional()
    before = model.embedding.weight.detach().clone()
    measure(model, torch.randn(2, 3, 8, 8))
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.filterwarnings("ignore:convsim skips")
@pytest.mark.parametrize("layer", [nn.LazyConv2d(4, 3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())])
def test_a_lazy_layer_that_is_called_is_named_and_stays_lazy(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), layer)
    with pytest.raises(InputError, match=r"the model calls a Lazy.* that is not yet initialized; run a forward pass"):
        measure(model, torch.randn(2, 3, 9, 9))
    model(torch.randn(2, 3, 9, 9))


class Partial(nn.Conv2d):
    """Takes a mask beside the images, and returns it with the maps."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mask = torch.ones_like(x) if mask is None else mask
        return nn.functional.conv2d(x * mask, self.weight, self.bias), mask[..., 1:-1, 1:-1]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_with_more_inputs_and_outputs_is_measured(named: bool, bias: bool) -> None:
    class Painting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Partial(3, 8, 3, bias=bias)

        def forward(self, images: Tensor) -> Tensor:
            mask = (images > 0).float()
            return self.layer(x=images, mask=mask)[0] if named else self.layer(images, mask)[0]

    model, images = Painting(), torch.randn(16, 3, 70, 70)
    (record,) = measure(model, images)
    plain = nn.Conv2d(3, 8, 3, bias=False)
    plain.weight = model.layer.weight
    (expected,) = measure(plain, images * (images > 0))
    assert record["fm_corr"] == pytest.approx(expected["fm_corr"], rel=1e-5)
    assert record["fm_corr_random"] == pytest.approx(expected["fm_corr_random"], rel=1e-5)
    if not bias:
        decorrelate_(model, images[:4, :, :9, :9])


def test_the_images_of_a_call_are_found_wherever_they_stand_in_it() -> None:
    class Upward(nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.named = nn.ConvTranspose2d(3, 4, 3, stride=2), named

        def forward(self, images: Tensor) -> Tensor:
            if self.named:
                return self.layer(output_size=[20, 20], input=images)
            return self.layer(images, [20, 20])

    images = torch.randn(2, 3, 9, 9)
    assert measure(Upward(True), images) == measure(Upward(False), images)
    for model in (found := Upward(True), expected := Upward(False)):
        decorrelate_(model, images)
    assert torch.equal(found.layer.weight, expected.layer.weight)


@pytest.mark.usefixtures("process_group")
def test_statistics_are_estimated_without_other_processes() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    images = torch.randn(4, 3, 9, 9)
    expected = measure(plain, images)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert measure(synchronized, images) == expected
    assert "forward" not in vars(synchronized[1])


class Leaky(nn.Conv2d):
    """Writes to what it is called with."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.leaky_relu(images, 0.2, inplace=True))


class Streaming(nn.Conv1d):
    """Remembers the end of what it was called with."""

    def __init__(self) -> None:
        super().__init__(3, 6, 3)
        self.cache = torch.zeros(1, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        images = torch.cat([self.cache.expand(len(images), -1, -1), images], -1)
        self.cache = images[:1, :, -2:]
        return super().forward(images)


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), Leaky(8, 8, 1), nn.Conv2d(8, 6, 3)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.a(images)
        return self.c(inner + self.b(inner))


def correlation(maps: Tensor) -> float:
    rows = maps.transpose(0, 1).flatten(1).double()
    upper = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return rows.corrcoef()[upper].abs().mean().item()


def test_a_layer_that_writes_to_its_input_is_measured_as_it_is_called() -> None:
    model, images = Beside(), torch.randn(4, 3, 12, 12)
    found = {record["name"]: record["fm_corr"] for record in measure(model, images)}
    with torch.no_grad():
        inner = nn.functional.leaky_relu(model.a(images), 0.2)
        b = nn.functional.conv2d(inner, model.b.weight)
        c = nn.functional.conv2d(inner + model.b(model.a(images)), model.c.weight)
    assert found["b.weight"] == pytest.approx(correlation(b), abs=1e-5)
    assert found["c.weight"] == pytest.approx(correlation(c), abs=1e-5)
    decorrelate_(model, images)
    assert measure(model, images)[2]["fm_corr"] < 1e-3


def test_a_layer_that_remembers_is_measured_as_it_is_called() -> None:
    model, images = nn.Sequential(Streaming()), torch.randn(4, 3, 40)
    with torch.no_grad():
        maps = nn.functional.conv1d(torch.cat([torch.zeros(4, 3, 2), images], -1), model[0].weight)
    assert measure(model, images)[0]["fm_corr"] == pytest.approx(correlation(maps), abs=1e-5)


class Sized(nn.Conv2d):
    """Holds its sizes as numbers."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3, padding=1)
        self.kernel_size = self.padding = 3  # type: ignore[assignment]
        self.padding = 1  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.weight, self.bias, padding=1)


class OfDictionaries(nn.Conv2d):
    def forward(self, images: Any) -> Tensor:
        return super().forward(images["x"] if isinstance(images, dict) else images)


class CalledOnDictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.next = OfDictionaries(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.next(self.kernels({"x": images}))
        return found


def test_layers_of_unusual_sizes_and_inputs_are_measured() -> None:
    images = torch.randn(2, 3, 12, 12)
    sized = nn.Sequential(Sized())
    assert measure(sized, images)[0]["fm_corr"] is not None
    assert ConvSimPenalty(sized)().item() == pytest.approx(convolutional_similarity(sized[0].weight).item())
    assert all(record["fm_corr"] is not None for record in measure(CalledOnDictionaries(), images))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_frozen_submodule_is_no_hindrance() -> None:
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)).eval()))
    model = nn.Sequential(frozen, nn.Conv2d(3, 8, 3))
    assert [record["name"] for record in measure(model, torch.randn(2, 3, 8, 8))] == ["1.weight"]


def test_quantized_layers_are_named_as_skipped() -> None:
    class Quantized(nn.Module):
        in_channels, out_channels, kernel_size, groups = 8, 4, (3, 3), 1

        def weight(self) -> Tensor:  # as torch.ao's has it
            return torch.ones(4, 8, 3, 3)

    class Hyper(nn.Module):
        in_channels, out_channels, kernel_size, groups = 8, 4, 3, 1

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Quantized(), Hyper())
    with pytest.warns(ConvsimWarning, match=r"1\.weight \(a Quantized, not a convolution"):
        ConvSimPenalty(model)


class Logging(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.calls, self.log, self.by_name = torch.zeros(1), [0], {"k": 0}

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(1)
        self.by_name["k"] += 1
        return super().forward(images)


def test_what_a_forward_writes_to_its_attributes_is_put_back() -> None:
    model = nn.Sequential(Logging())
    log = model[0].log
    measure(model, torch.randn(2, 3, 8, 8))
    assert (model[0].calls.item(), log, model[0].log, model[0].by_name) == (0, [0], [0], {"k": 0})


def test_names_leave_activation_checkpointing_out() -> None:
    wrapped = checkpoint_wrapper(nn.Sequential(nn.Conv2d(3, 8, 3)))
    model = nn.Sequential(wrapped)
    assert [record["name"] for record in measure(model, torch.randn(2, 3, 8, 8))] == ["0.0.weight"]
    assert "0.0.weight" in model.state_dict()
    assert minimize_(model, iterations=1, include=["0.0.weight"])
    assert ConvSimPenalty(model)() > 0
    assert [record["name"] for record in measure(checkpoint_wrapper(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8))] == [
        "weight"
    ]
