from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from conftest import same_bits
from torch import Tensor, nn

from convsim_cli.batch_norm import choose_statistics
from convsim_cli.errors import InputError
from convsim_cli.kernels import is_convolution
from convsim_cli.measurement.figures import FIGURES
from convsim_cli.measurement.network import measure
from convsim_cli.networks.architectures import build_network

SCALE_FREE = [figure.key for figure in FIGURES if not figure.moves_with_scale]


def scale_filters_(model: nn.Module) -> None:
    """Multiply every filter, and its bias, by a random factor from 0.5 to 2, where batch normalization follows."""
    generator = torch.Generator().manual_seed(1)
    layers = [layer for layer in model.modules() if not list(layer.children())]
    with torch.no_grad():
        for layer, following in pairwise(layers):
            if is_convolution(layer) and isinstance(following, nn.BatchNorm2d):
                factors = 2 ** (2 * torch.rand(len(layer.weight), generator=generator) - 1)
                layer.weight.mul_(factors.reshape(-1, 1, 1, 1))
                if layer.bias is not None:
                    layer.bias.mul_(factors)


def train_(model: nn.Module, images: Tensor) -> None:
    """Give batch normalization the statistics of training batches."""
    with torch.no_grad():
        for part in images.split(4):
            model.train()(part)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("name", "layers"),
    [("cnn1", []), ("resnet18", ["conv1.*", "layer2.*"]), ("torchvision:resnet18", ["conv1.*", "layer1.*"])],
)
def test_scaling_filters_changes_no_scale_free_figure(name: str, layers: list[str], trained: bool) -> None:
    model, images = build_network(name), torch.randn(4, 3, 32, 32)
    if trained:
        train_(model, torch.randn(8, 3, 32, 32) + 1)
    wanted = "inputs" if trained else "auto"
    before = measure(model, images, include=layers, bn_statistics=wanted)
    scale_filters_(model)
    after = measure(model, images, include=layers, bn_statistics=wanted)
    for record, other in zip(before, after, strict=True):
        expected = {key: record[key] for key in SCALE_FREE}
        nearly = {k: pytest.approx(v, rel=2e-3) if isinstance(v, float) else v for k, v in expected.items()}
        assert {key: other[key] for key in SCALE_FREE} == nearly
        assert other["norm"] != pytest.approx(record["norm"], rel=1e-2)


def test_with_stored_statistics_a_fresh_network_moves_with_scale() -> None:
    model, images = build_network("cnn1"), torch.randn(4, 3, 32, 32)
    before = measure(model, images, include=["4.*"], bn_statistics="stored")
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                layer.weight.mul_(0.1)
    after = measure(model, images, include=["4.*"], bn_statistics="stored")
    assert abs(after[0]["fm_cos"] - before[0]["fm_cos"]) > 0.02


def batch_normalized(**options: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Conv2d(4, 4, 3))  # type: ignore[arg-type]


def test_only_a_trained_networks_statistics_match_its_kernels() -> None:
    model = batch_normalized()
    assert choose_statistics(model) == "inputs"
    train_(model, torch.randn(4, 3, 8, 8))
    assert choose_statistics(model) == "stored"
    assert choose_statistics(model, kernels_changed=True) == "inputs"
    assert choose_statistics(model, "stored", kernels_changed=True) == "stored"
    assert choose_statistics(model, "inputs") == "inputs"


def test_means_or_counters_alone_say_that_statistics_are_trained() -> None:
    without_counter, counted = batch_normalized(), batch_normalized()
    train_(without_counter, torch.randn(4, 3, 8, 8))
    without_counter[1].num_batches_tracked = None
    counted[1].num_batches_tracked.fill_(3)
    assert choose_statistics(without_counter) == "stored"
    assert choose_statistics(counted) == "stored"
    for counter in (None, torch.tensor(0)):
        fresh = batch_normalized()
        fresh[1].num_batches_tracked = counter
        assert choose_statistics(fresh) == "inputs"


def test_one_trained_layer_is_enough_to_keep_the_stored_statistics() -> None:
    model = nn.Sequential(batch_normalized(), batch_normalized())
    train_(model[0], torch.randn(4, 3, 8, 8))
    assert choose_statistics(model) == "stored"


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 3)), batch_normalized(track_running_stats=False)])
def test_a_network_without_batch_norm_statistics_has_no_choice(model: nn.Module) -> None:
    assert choose_statistics(model) is None
    assert choose_statistics(model, "inputs") is None


def test_an_unknown_choice_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"`bn_statistics` 'input': did you mean 'inputs'\?"):
        choose_statistics(batch_normalized(), "input")


def test_the_networks_own_statistics_are_never_written_to() -> None:
    model = batch_normalized()
    buffers, before = dict(model[1].named_buffers()), {name: b.clone() for name, b in model[1].named_buffers()}
    during: list[bool] = []
    model[1].register_forward_hook(lambda *_: during.append(same_bits(buffers, before)))
    measure(model, torch.randn(4, 3, 8, 8), bn_statistics="inputs")
    assert during == [True, True]
    assert dict(model[1].named_buffers()).keys() == buffers.keys()
    assert all(found is buffers[name] for name, found in model[1].named_buffers())
    assert same_bits(buffers, before)


def test_an_exception_puts_the_networks_own_statistics_back() -> None:
    def stopped() -> Iterator[Tensor]:
        yield torch.randn(4, 3, 8, 8)
        raise KeyboardInterrupt

    class Stopped:
        def __iter__(self) -> Iterator[Tensor]:
            return stopped()

    model = batch_normalized()
    own = dict(model[1].named_buffers())
    with pytest.raises(KeyboardInterrupt):
        measure(model, Stopped(), bn_statistics="inputs")
    assert all(found is own[name] for name, found in model[1].named_buffers())


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_either_statistic_alone_shows_that_a_layer_has_seen_data(buffer: str) -> None:
    model = batch_normalized()
    model[1].get_buffer(buffer).fill_(0.5)
    assert choose_statistics(model) == "stored"
