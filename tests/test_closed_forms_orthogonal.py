from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import Convsim, same_bits
from safetensors.torch import save_file
from torch import Tensor, nn

from convsim_cli.closed_forms import orthogonalize_, orthogonalize_kernel, orthogonalize_weight_
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.kernels import Kernel

SHAPES = [  # and groups
    ((6, 3, 3, 3), 1),
    ((6, 3, 3, 3), 2),
    ((4, 5, 1, 1), 1),
    ((5, 2, 7), 1),
    ((4, 2, 2, 3, 2), 2),
    ((12, 2, 2, 2), 1),  # more filters than directions: 8, of which 2 are means
    ((1, 2, 3, 3), 1),
]


def literal(weight: Tensor, groups: int = 1) -> Tensor:
    """The formula as it reads, group by group, filter by filter."""
    found = []
    for group in weight.double().chunk(groups):
        rows = group.flatten(2)
        if rows.shape[2] > 1:
            rows = rows - rows.mean(2, keepdim=True)
        u, values, vt = torch.linalg.svd(rows.flatten(1), full_matrices=False)
        kept = values > 1e-6 * values.max()
        directions = u[:, kept] @ vt[kept]
        scaled = [d / d.norm() * old.norm() for d, old in zip(directions, group, strict=True)]
        found.append(torch.stack(scaled).reshape(group.shape))
    return torch.cat(found)


def cosines(weight: Tensor) -> Tensor:
    rows = nn.functional.normalize(weight.double().flatten(1))
    return rows @ rows.T


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_the_kernels_are_those_of_the_literal_formula(shape: tuple[int, ...], groups: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected = literal(weight, groups)
    torch.testing.assert_close(orthogonalize_weight_(weight, groups), expected, rtol=1e-9, atol=1e-12)


def test_filters_are_orthogonal_without_means_and_of_their_own_norms() -> None:
    weight = torch.randn(16, 4, 3, 3) * torch.logspace(-2, 2, 16).reshape(-1, 1, 1, 1)
    found = orthogonalize_weight_(weight.clone())
    torch.testing.assert_close(cosines(found), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert (found.mean((2, 3)).abs() <= 1e-6 * found.flatten(1).norm(dim=1, keepdim=True)).all()


def test_more_filters_than_directions_are_spread_evenly() -> None:
    found = orthogonalize_weight_(torch.randn(32, 2, 2, 2, dtype=torch.float64)).flatten(1)
    assert (torch.linalg.svdvals(found) > 1e-9).sum() == 6
    rows = orthogonalize_weight_(torch.randn(6, 2, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(cosines(rows), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float64_and_cast_back(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 4, 3, 3).to(dtype)
    kernel = Kernel("k", tuple(weight.shape))
    found = orthogonalize_kernel(kernel, weight)
    assert torch.equal(found, literal(weight).float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 1e-38, 1e-25, 1e-10])
def test_dead_filters_stay_bit_identical_and_change_nothing(share: float, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    weight[[2, 5]] *= share
    weight = weight.to(dtype)
    found = orthogonalize_weight_(weight.clone())
    assert same_bits(found[[2, 5]], weight[[2, 5]])
    living = [0, 1, 3, 4, 6, 7]
    torch.testing.assert_close(found[living], orthogonalize_weight_(weight[living].clone()))


def test_constant_filters_stay_bit_identical_and_change_nothing() -> None:
    weight = torch.randn(6, 4, 3, 3)
    weight[[1, 4]] = torch.randn(2, 4, 1, 1)
    found = orthogonalize_weight_(weight.clone())
    assert same_bits(found[[1, 4]], weight[[1, 4]])
    torch.testing.assert_close(found[[0, 2, 3, 5]], orthogonalize_weight_(weight[[0, 2, 3, 5]].clone()))


def test_a_layer_whose_filters_are_all_constant_stays_bit_identical() -> None:
    weight = torch.randn(6, 4, 1, 1, dtype=torch.float64).expand(6, 4, 3, 3).contiguous()
    assert same_bits(orthogonalize_weight_(weight.clone()), weight)


def test_a_filter_without_a_direction_stays_bit_identical() -> None:
    directions = orthogonalize_weight_(torch.randn(4, 3, 3, 3, dtype=torch.float64))
    weight = directions / directions.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    weight[1] = weight[0]  # singular value √2
    weight[3] *= 1.1e-6
    assert same_bits(orthogonalize_weight_(weight.clone())[3], weight[3])


def test_a_weight_is_changed_in_place_like_by_torchs_initializers() -> None:
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = layer.weight
    before, address = weight.detach().clone(), weight.data_ptr()
    assert orthogonalize_weight_(weight) is weight
    assert weight.data_ptr() == address
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.requires_grad
    assert weight.is_leaf
    assert not torch.equal(weight, before)


def test_a_weight_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 to 5 axes, none of them empty, got torch.float32 \[3, 3\]"):
        orthogonalize_weight_(torch.randn(3, 3))
    with pytest.raises(ValueError, match="2 groups do not divide the 3 filters"):
        orthogonalize_weight_(torch.randn(3, 1, 3), groups=2)
    with pytest.raises(InputError, match="1 of 9 values"):
        orthogonalize_weight_(torch.tensor([[[1.0, 2, 3]], [[1, torch.inf, 3]], [[3, 2, 1]]]))


def test_a_result_that_the_type_cannot_hold_is_refused() -> None:
    weight = torch.full((2, 64, 2), 6e4).half()
    weight[0, :, 0] = 0  # off its mean, each value is half as large; at the filter's norm √½ of 60,000, not more
    weight[1, 0, 0] = 0  # off its mean in one channel alone, which then takes all of the norm
    before = weight.clone()
    with pytest.raises(InputError, match="exceed the range of float16"):
        orthogonalize_weight_(weight)
    assert torch.equal(weight, before)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 3, 2),
    )


def test_orthogonalizing_a_model_changes_only_its_kernels() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[int] = []
    with pytest.warns(ConvsimWarning, match=r"skips 3\.weight \(depthwise"):
        records = orthogonalize_(model, advance=told.append)
    assert [record["name"] for record in records] == ["0.weight", "2.weight", "4.weight"]
    assert told == [1, 1, 1]
    after = model.state_dict()
    assert {name for name in before if not same_bits(before[name], after[name])} == {"0.weight", "2.weight", "4.weight"}
    assert torch.equal(after["0.weight"], literal(before["0.weight"]).float())
    transposed = literal(before["4.weight"].transpose(0, 1)).transpose(0, 1).float()
    torch.testing.assert_close(after["4.weight"], transposed)
    for record in records:
        assert record["after"]["norm"] == pytest.approx(record["before"]["norm"], rel=1e-6)
        assert record["before"]["norm"] == pytest.approx(before[record["name"]].double().norm().item())
        assert record["after"].keys() == {"cs", "ncs", "norm"}


def test_patterns_choose_the_layers() -> None:
    assert [record["name"] for record in orthogonalize_(network(), include=["0.*", "2.*"], exclude=["2.*"])] == [
        "0.weight"
    ]
    with pytest.raises(InputError, match=r"'5\.\*' matches no tensor"):
        orthogonalize_(network(), exclude=["5.*"])


def test_a_model_is_untouched_when_one_layer_fails() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"4\.weight .* 1 of 48 values"):
        orthogonalize_(model, exclude=["3.*"])
    assert torch.equal(model[0].weight, before)


def test_parametrized_layers_are_named_in_a_warning() -> None:
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match=r"skips 0\.weight"):
        assert [record["name"] for record in orthogonalize_(model)] == ["2.weight", "4.weight"]


@pytest.mark.parametrize(("normalizes", "method"), [(False, "orthogonal"), (False, "dct"), (True, "orthogonal")])
def test_init_warns_where_no_layer_normalizes_a_signal_without_means(
    normalizes: bool, method: str, tmp_path: Path, convsim: Convsim
) -> None:
    state = {"0.weight": torch.randn(8, 3, 3, 3), "0.bias": torch.zeros(8)}
    if normalizes:
        state |= {"1.weight": torch.ones(8), "1.bias": torch.zeros(8)}
    save_file(state, tmp_path / "model.safetensors")
    said = convsim("init", tmp_path / "model.safetensors", "--method", method).err
    assert ("--method orthogonal subtracts the means of filters" in said) == (not normalizes and method == "orthogonal")


def test_training_warns_of_it_too(tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch) -> None:
    network = "nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))"
    (tmp_path / "plain_network.py").write_text(f"from torch import nn\n\n\ndef plain():\n    return {network}\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = [
        "--dataset",
        "digits",
        "--epochs",
        "1",
        "--limit-train",
        "64",
        "--run-dir",
        tmp_path / "runs",
        "--mode",
        "init",
    ]
    outcome = convsim("train", "--arch", "plain_network:plain", *run, "--method", "orthogonal")
    sys.modules.pop("plain_network", None)
    assert (outcome.code, "subtracts the means of filters" in outcome.err) == (0, True), outcome.err
