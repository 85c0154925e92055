from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import same_bits
from torch import Tensor, nn

from convsim_cli.closed_forms import decorrelate_
from convsim_cli.errors import InputError


def network() -> nn.Sequential:
    """Four convolutions of CNN1's kind, in float64: batch normalization, pooling, stride and groups."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=2), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 8, 3, groups=2, padding=1), nn.Dropout(0.5), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)),
    ).double()


def images(count: int = 32) -> Tensor:
    """Images whose channels and neighbouring pixels are alike."""
    noise = torch.randn(count, 3, 14, 14, dtype=torch.float64)
    return nn.functional.avg_pool2d(noise + noise.mean(1, keepdim=True), 3, 1) + 0.5


def correlation(maps: Tensor) -> Tensor:
    """The correlation matrix of maps `[B, S, *space]`, over all images and positions."""
    return maps.detach().double().transpose(0, 1).flatten(1).corrcoef()


def off_diagonal(matrix: Tensor) -> float:
    return float((matrix - matrix.diag().diag()).abs().max())


def run(model: nn.Module, inputs: Tensor) -> dict[nn.Module, list[Tensor]]:
    """The maps of each convolution, call by call, batch normalization by the statistics of the batch."""
    model = copy.deepcopy(model)
    found: dict[nn.Module, list[Tensor]] = {}
    for layer in model.modules():
        layer.training = isinstance(layer, nn.BatchNorm2d)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda layer, _, maps: found.setdefault(layer, []).append(maps.detach()))
    with torch.no_grad():
        model(inputs)
    return found


def literal(weight: Tensor, maps: Tensor, groups: int = 1) -> Tensor:
    """The formula as it reads, group by group: K ← D G^(−1/2) diag(s)⁻¹ K."""
    found = []
    for k, f in zip(weight.double().chunk(groups), maps.double().chunk(groups, 1), strict=True):
        values = f.transpose(0, 1).flatten(1)
        s = values.std(1, correction=0)
        eigenvalues, vectors = torch.linalg.eigh(values.corrcoef())
        kept = eigenvalues > 1e-8 * eigenvalues.max()
        g = vectors[:, kept] @ torch.diag(eigenvalues[kept] ** -0.5) @ vectors[:, kept].T
        new = g @ torch.diag(1 / s) @ k.flatten(1)
        d = torch.diag(k.flatten(1).norm(dim=1) / new.norm(dim=1))
        found.append((d @ new).reshape(k.shape))
    return torch.cat(found)


def filter_norms(layer: Any) -> Tensor:
    weight = layer.weight.detach()
    return (weight.transpose(0, 1) if layer.transposed else weight).flatten(1).norm(dim=1)


def test_maps_of_every_layer_are_uncorrelated_and_filters_keep_their_norms() -> None:
    model, inputs = network(), images()
    norms = [filter_norms(model[i]) for i in (0, 4, 7, 10)]
    assert min(off_diagonal(correlation(maps)) for (maps,) in run(model, inputs).values()) > 0.1
    decorrelate_(model, inputs)
    first, second, grouped, transposed = (correlation(maps) for (maps,) in run(model, inputs).values())
    for matrix in (first, second, grouped[:4, :4], grouped[4:, 4:], transposed):
        assert off_diagonal(matrix) < 1e-6
    for layer, before in zip((model[0], model[4], model[7], model[10]), norms, strict=True):
        torch.testing.assert_close(filter_norms(layer), before, rtol=1e-12, atol=0)


def test_the_kernels_are_those_of_the_literal_formula_layer_after_layer() -> None:
    model, inputs = network(), images()
    expected = copy.deepcopy(model)
    for position, (index, groups) in enumerate([(0, 1), (4, 1), (7, 2), (10, 1)]):
        (maps,) = list(run(expected, inputs).values())[position]
        weight = expected[index].weight.data
        turned = index == 10  # a transposed convolution
        new = literal(weight.transpose(0, 1) if turned else weight, maps, groups)
        weight.copy_(new.transpose(0, 1) if turned else new)
    decorrelate_(model, inputs)
    for index in (0, 4, 7, 10):
        torch.testing.assert_close(model[index].weight, expected[index].weight, rtol=1e-7, atol=1e-9)


def test_the_formula_holds_as_far_as_the_rank_goes() -> None:
    model = nn.Sequential(nn.Conv2d(2, 12, 2)).double()  # 12 filters of 8 taps
    inputs = torch.randn(16, 2, 9, 9, dtype=torch.float64)
    ((maps,),) = run(model, inputs).values()
    expected = literal(model[0].weight.detach(), maps)
    decorrelate_(model, inputs)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-7, atol=1e-9)
    ((maps,),) = run(model, inputs).values()
    values = maps.transpose(0, 1).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(values / filter_norms(model[0])[:, None]))
    assert (eigenvalues > 1e-9 * eigenvalues.max()).sum() == 8


def test_everything_but_the_kernels_is_left_as_it_was() -> None:
    model = network()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [layer.training for layer in model.modules()]
    state = torch.get_rng_state()
    inputs = images()
    torch.set_rng_state(state)
    decorrelate_(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.training for layer in model.modules()] == modes
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {"0.weight", "4.weight", "7.weight", "10.weight"}


class Restless(nn.Module):
    """Counts its calls in a buffer, draws random numbers, and fails at a given call."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.fails_at = fails_at

    def forward(self, maps: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(3)
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return maps


@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_a_restless_model_is_left_as_it_was_whether_it_fails_or_not(fails_at: int | None) -> None:
    model, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), Restless(fails_at), nn.Conv2d(8, 4, 3)).double(), images()
    buffer, before = model[1].calls, model[0].weight.detach().clone()
    state = torch.get_rng_state()
    if fails_at:
        with pytest.raises(KeyboardInterrupt):
            decorrelate_(model, inputs)
        assert torch.equal(model[0].weight, before)
        assert not model[0]._forward_pre_hooks
        assert model.training
    else:
        decorrelate_(model, inputs)
        assert not torch.equal(model[0].weight, before)
    assert model[1].calls is buffer
    assert buffer == 0
    assert torch.equal(torch.get_rng_state(), state)


class Backwards(nn.Module):
    """Defines its layers in the reverse of their order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(6, 4, 3)
        self.first = nn.Conv2d(3, 6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        last: Tensor = self.last(input=self.first(inputs).relu())
        return last


def test_layers_are_changed_in_the_order_of_execution() -> None:
    model, inputs = Backwards().double(), images()
    told: list[int] = []
    records = decorrelate_(model, inputs, advance=told.append)
    assert [record["name"] for record in records] == ["first.weight", "last.weight"]
    assert sum(told) == 2
    assert all(off_diagonal(correlation(maps)) < 1e-6 for (maps,) in run(model, inputs).values())


class Mirrored(nn.Module):
    """Calls a layer on maps and on a part of their mirror images, between layers that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.first(inputs).relu()
        last: Tensor = self.last(torch.cat([self.twice(maps), self.twice(maps.flip(-1)[:, :, 3:])], 2).relu())
        return last


def test_a_layer_called_several_times_is_uncorrelated_over_all_calls() -> None:
    model, inputs = Mirrored().double(), images()
    records = decorrelate_(model, inputs)
    assert [record["name"] for record in records] == ["first.weight", "twice.weight", "last.weight"]
    first, twice, last = run(model, inputs).values()
    assert off_diagonal(correlation(first[0])) < 1e-6
    assert off_diagonal(correlation(torch.cat([maps.flatten(2) for maps in twice], 2))) < 1e-6
    assert off_diagonal(correlation(last[0])) < 1e-6


def test_a_layer_that_is_called_less_often_after_the_change_is_named() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
            self.before = self.first.weight.detach().double()

        def forward(self, inputs: Tensor) -> Tensor:
            maps: Tensor = self.first(inputs)
            return self.second(maps) if torch.equal(self.first.weight, self.before) else maps

    model = Fickle().double()
    with pytest.raises(InputError, match=r"second\.weight: the model calls this layer 1 times, but 0 times once"):
        decorrelate_(model, images())
    assert torch.equal(model.before, model.first.weight)


def test_a_shared_weight_is_changed_for_the_encoders_maps() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)
            self.decoder.weight = self.encoder.weight

        def forward(self, inputs: Tensor) -> Tensor:
            decoded: Tensor = self.decoder(self.encoder(inputs).relu())
            return decoded

    model, inputs = Tied().double(), images()
    decorrelate_(model, inputs)
    encoded, _ = run(model, inputs).values()
    assert off_diagonal(correlation(encoded[0])) < 1e-6


@pytest.mark.parametrize("share", [0.0, 1e-25, 1e-10])
def test_dead_filters_and_those_whose_maps_do_not_vary_stay_bit_identical(share: float) -> None:
    model, inputs = nn.Sequential(nn.Conv2d(3, 8, 3)), images().float()
    inputs[:, 2] = 0.7 + 1e-7 * torch.rand(32, 12, 12)  # constant but for rounding
    with torch.no_grad():
        model[0].weight[[2, 5]] *= share
        model[0].weight[3, :2] = 0  # sees the constant channel alone
    before = model[0].weight.detach().clone()
    decorrelate_(model, inputs)
    after = model[0].weight.detach()
    assert same_bits(after[[2, 3, 5]], before[[2, 3, 5]])
    ((maps,),) = run(model, inputs).values()
    assert off_diagonal(correlation(maps[:, [0, 1, 4, 6, 7]])) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float64_and_cast_back(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(1, 12, 2)).to(dtype)  # 12 filters of 4 taps: maps rounded to halves have rank 12
    inputs = images()[:, :1].to(dtype)
    ((maps,),) = run(copy.deepcopy(model).double(), inputs.double()).values()
    expected = literal(model[0].weight.detach(), maps)
    decorrelate_(model, inputs)
    assert model[0].weight.dtype == dtype
    torch.testing.assert_close(model[0].weight.detach(), expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_the_smallest_change_leaves_uncorrelated_maps_alone() -> None:
    model, inputs = nn.Sequential(nn.Conv2d(3, 8, 3)).double(), images()
    decorrelate_(model, inputs)
    once = model[0].weight.detach().clone()
    decorrelate_(model, inputs)
    torch.testing.assert_close(model[0].weight.detach(), once, rtol=1e-9, atol=1e-12)


def test_large_batches_are_taken_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network(), images()
    whole = copy.deepcopy(model)
    decorrelate_(whole, inputs)
    monkeypatch.setattr("convsim_cli.closed_forms._CHUNK", 5000)
    decorrelate_(model, inputs)
    for ours, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-10)


def test_autocast_within_the_model_does_not_reach_the_maps() -> None:
    class Cast(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(inputs)

    inputs = images().float()
    model = Cast(nn.Conv2d(3, 8, 3))
    plain = nn.Sequential(copy.deepcopy(model[0]))
    decorrelate_(model, inputs)
    decorrelate_(plain, inputs)
    assert torch.equal(model[0].weight, plain[0].weight)


def test_layers_never_called_are_named_and_progress_still_ends() -> None:
    model = Backwards().double()
    model.unused = nn.Conv2d(3, 4, 3)
    told: list[int] = []
    with pytest.warns(UserWarning, match=r"no inputs reach: unused\.weight"):
        records = decorrelate_(model, images(), advance=told.append)
    assert len(records) == 2
    assert sum(told) == 3


def test_calls_on_nothing_change_no_kernel() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.some, self.none = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            maps = self.body(inputs)
            self.some(maps[:0])
            return self.some(maps) + self.none(maps[:0]).sum()

    model, inputs = Heads().double(), images()
    plain, unused = nn.Sequential(*copy.deepcopy([model.body, model.some])), model.none.weight.clone()
    with pytest.warns(UserWarning, match=r"no inputs reach: none\.weight"):
        assert len(decorrelate_(model, inputs)) == 2
    decorrelate_(plain, inputs)
    assert torch.equal(model.some.weight, plain[1].weight)
    assert torch.equal(model.none.weight, unused)


def test_patterns_choose_the_layers() -> None:
    assert [record["name"] for record in decorrelate_(network(), images(), exclude=["4.*", "7.*", "10.*"])] == [
        "0.weight"
    ]
    with pytest.raises(InputError, match=r"'5\.\*' matches no tensor"):
        decorrelate_(network(), images(), include=["5.*"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model, inputs: model[4].weight.data.fill_(torch.nan), r"4\.weight .* values are NaN or Inf"),
        (
            lambda model, inputs: inputs[3, 0, 2].fill_(torch.inf),
            r"0\.weight: its feature maps on these `images` contain",
        ),
        (lambda model, inputs: model[1].weight.data.fill_(torch.nan), r"4\.weight: its feature maps on these `images`"),
    ],
    ids=["kernel", "images", "batch norm"],
)
def test_nan_and_inf_are_named_and_nothing_is_changed(
    spoil: Callable[[nn.Module, Tensor], object], message: str
) -> None:
    model, inputs = network(), images()
    spoil(model, inputs)
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=message):
        decorrelate_(model, inputs)
    assert torch.equal(model[0].weight, before)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="`images` is empty"):
        decorrelate_(network(), images()[:0])
