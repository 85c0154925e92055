from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel
from convsim_cli.measurement import feature_maps as probes
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity, probe_kernel
from convsim_cli.measurement.synthetic_inputs import make_inputs


def literal(maps: Tensor, groups: int) -> tuple[float, float]:
    """Mean over inputs and pairs of |cos(F_i, F_j)| and of ⟨F_i, F_j⟩², by loops in float64."""
    cosines, products = [], []
    for image in maps.double().flatten(2):
        for group in image.chunk(groups):
            for i, j in combinations(range(group.shape[0]), 2):
                product = group[i] @ group[j]
                products.append(product**2)
                if group[i].any() and group[j].any():
                    cosines.append((product / group[i].norm() / group[j].norm()).abs())
    return torch.stack(cosines).mean().item(), torch.stack(products).mean().item()


@pytest.mark.parametrize("groups", [1, 2])
def test_feature_map_figures_match_loops_over_inputs_and_pairs(groups: int) -> None:
    maps = torch.randn(5, 6, 4, 3)
    maps[2, 1] = 0
    similarity = FeatureMapSimilarity(groups)
    for chunk in maps.split(2):
        similarity.update(chunk)
    found = similarity.result()
    assert (found["fm_cos"], found["fm_inner2"]) == pytest.approx(literal(maps, groups), rel=1e-5)
    assert found["dead"] == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosines_do_not_move_with_scale_even_at_the_ends_of_float32(scale: float) -> None:
    maps = torch.randn(2, 4, 8, 8)
    similarity = FeatureMapSimilarity()
    similarity.update(maps * scale)
    assert similarity.result()["fm_cos"] == pytest.approx(literal(maps, 1)[0], rel=1e-5)
    assert similarity.result()["dead"] == 0


def test_dead_filters_are_counted_and_left_out_of_the_cosines() -> None:
    maps = torch.randn(3, 4, 5, 5)
    maps[:, 2] = 0
    similarity = FeatureMapSimilarity()
    similarity.update(maps)
    assert similarity.result()["dead"] == 1
    assert similarity.result()["fm_cos"] == pytest.approx(literal(maps[:, [0, 1, 3]], 1)[0], rel=1e-5)


def test_a_single_position_has_no_angle_and_no_inputs_give_null() -> None:
    similarity = FeatureMapSimilarity()
    assert set(similarity.result().values()) == {None}
    similarity.update(torch.randn(3, 4, 1, 1))
    assert similarity.result()["fm_cos"] is None
    assert similarity.result()["redundant"] is None
    assert similarity.most_similar(3) == []
    assert similarity.result()["fm_inner2"] is not None


@pytest.mark.parametrize(("groups", "taps"), [(1, (3, 3)), (2, (5, 2)), (1, (4,)), (1, (2, 3, 2))])
def test_a_layer_by_itself_is_probed_under_full_padding_on_inputs_of_its_own_channels(
    groups: int, taps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = layers[len(taps) - 1](4, 6, taps, groups=groups, padding=tuple(k - 1 for k in taps), bias=False)  # type: ignore[arg-type]
    kernel = Kernel("k", tuple(layer.weight.shape), groups)
    inputs = make_inputs("white", 16, 4, (8,) * len(taps), seed=3)
    with torch.no_grad():
        expected = literal(layer(inputs), groups)
    monkeypatch.setattr(probes, "_GRAM_ELEMENTS", 6 * 400)  # several chunks
    found = probe_kernel(kernel, layer.weight.detach(), "white", side=8, seed=3).result()
    assert (found["fm_cos"], found["fm_inner2"]) == pytest.approx(expected, rel=1e-5)


def test_inputs_are_what_their_names_say_and_repeat_with_their_seed() -> None:
    white, uniform, natural = (make_inputs(name, 64, 3, (32, 32), seed=1) for name in ("white", "uniform", "natural"))
    assert abs(white.mean()) < 0.02
    assert abs(white.std() - 1) < 0.02
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() <= 1
    torch.testing.assert_close(natural.mean((2, 3)), torch.zeros(64, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(natural.std((2, 3), correction=0), torch.ones(64, 3))
    assert torch.equal(natural, make_inputs("natural", 64, 3, (32, 32), seed=1))
    assert not torch.equal(natural, make_inputs("natural", 64, 3, (32, 32), seed=2))


def test_the_amplitude_of_natural_inputs_falls_as_one_over_f() -> None:
    spectrum = torch.fft.fft2(make_inputs("natural", 4, 2, (32, 32))).abs()
    frequency = (torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.fftfreq(32)[None, :] ** 2).sqrt()
    product = (spectrum * frequency)[..., frequency > 0]
    torch.testing.assert_close(product, product.mean(-1, keepdim=True).expand_as(product), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e38), (torch.float32, 1e-38), (torch.float64, 1e-60)])
def test_a_layer_of_any_scale_is_probed(dtype: torch.dtype, scale: float) -> None:
    kernel, weight = Kernel("k", (4, 2, 3, 3)), torch.rand(4, 2, 3, 3, dtype=dtype)
    exact, found = (probe_kernel(kernel, w).result() for w in (weight, weight * scale))
    assert found["fm_cos"] == pytest.approx(exact["fm_cos"], rel=1e-5)
    assert found["dead"] == 0
    assert found["fm_inner2"] == pytest.approx(exact["fm_inner2"] * scale**4, rel=1e-4)


def test_a_single_pixel_has_no_spectrum_and_gives_no_nan() -> None:
    assert make_inputs("natural", 2, 1, (1, 1)).isfinite().all()
    assert probe_kernel(Kernel("k", (4, 2, 3, 3)), torch.rand(4, 2, 3, 3), "natural", side=1).result()["fm_cos"] is None


def test_an_unknown_input_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'natural'"):
        make_inputs("naturel", 1, 1, (4, 4))


def test_filters_that_say_the_same_are_redundant_and_come_first_among_the_most_similar() -> None:
    maps = torch.randn(5, 6, 8, 8)
    maps[:, 4] = -3 * maps[:, 1]  # of the same angle, whatever scale and sign
    maps[:, 2] = maps[:, 0] + 0.1 * maps[:, 3]
    similarity = FeatureMapSimilarity()
    for part in maps.split(2):
        similarity.update(part)
    assert similarity.result()["redundant"] == 4
    first, second = similarity.most_similar(2)
    assert (first["filters"], second["filters"]) == ([1, 4], [0, 2])
    assert first["cos"] == pytest.approx(1)
    flat = nn.functional.normalize(maps.flatten(2), dim=-1)
    torch.testing.assert_close(similarity.matrix()[0], (flat @ flat.mT).abs().mean(0) - torch.eye(6))


def test_pairs_of_a_grouped_layer_are_named_by_their_filters_and_dead_maps_make_none() -> None:
    maps = torch.randn(3, 4, 6, 6)
    maps[0, 3] = 0  # no angle on the first input; the mean is over the others
    similarity = FeatureMapSimilarity(groups=2)
    similarity.update(maps)
    pairs = {tuple(pair["filters"]): pair["cos"] for pair in similarity.most_similar(9)}
    assert set(pairs) == {(0, 1), (2, 3)}
    expected = nn.functional.cosine_similarity(maps[1:, 2].flatten(1), maps[1:, 3].flatten(1)).abs().mean().item()
    assert pairs[2, 3] == pytest.approx(expected, rel=1e-5)


def test_white_maps_are_as_similar_as_chance_says() -> None:
    similarity = FeatureMapSimilarity()
    similarity.update(torch.randn(8, 40, 20, 20))
    found = similarity.result()
    assert found["fm_cos"] == pytest.approx(found["fm_cos_random"], rel=0.02)


def test_calls_at_several_sizes_each_count_against_their_own_chance() -> None:
    similarity = FeatureMapSimilarity()
    for side in (20, 1, 4):
        similarity.update(torch.randn(8, 40, side, side))
    found = similarity.result()
    chance = [(2 / (torch.pi * positions)) ** 0.5 for positions in (400, 16)]
    assert found["fm_cos_random"] == pytest.approx(sum(chance) / 2)
    assert found["fm_cos"] == pytest.approx(found["fm_cos_random"], rel=0.03)
    similarity.update(torch.randn(8, 40, 1, 1))  # a last call at a single position takes nothing away
    assert similarity.result()["fm_cos"] == found["fm_cos"]
    assert similarity.most_similar(1)
