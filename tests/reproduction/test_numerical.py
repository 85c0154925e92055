from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import Convsim
from references import correlate
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.reproduction.numerical import (
    EPISODES,
    INPUT_LENGTH,
    draw_episodes,
    find_table,
    inner_products,
    numerical_steps,
    pair_gradient,
    pair_objective,
    reproduce_table,
    run_episodes,
    summarize_episodes,
)
from convsim_cli.reproduction.published import KEYS, NUMERICAL_ROWS, NUMERICAL_TABLES


@pytest.mark.parametrize("padding", ["full", "valid"])
def test_inner_products_are_those_of_the_feature_maps_of_equation_2(padding: Literal["full", "valid"]) -> None:
    episodes = draw_episodes(5, padding, 6, seed=2)
    generator = torch.Generator().manual_seed(2)
    torch.rand(6, 2, 5, 1, generator=generator, dtype=torch.float64)
    inputs = torch.rand(6, INPUT_LENGTH, generator=generator, dtype=torch.float64)
    found = inner_products(episodes.kernels, episodes.gram)
    for episode in range(6):
        maps = torch.nn.functional.conv1d(
            inputs[episode].reshape(1, 1, -1),
            episodes.kernels[episode].reshape(2, 1, 5),
            padding=4 if padding == "full" else 0,
        )[0]
        torch.testing.assert_close(found[episode], maps @ maps.T)


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_objectives_and_gradients_are_the_literal_ones_per_episode(name: str) -> None:
    kernels = draw_episodes(4, "full", 3, seed=1).kernels.requires_grad_()
    found = pair_objective(kernels, find_table(name))

    def literal(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).square() if name == "table1" else correlate(a, b).square().sum()

    expected = torch.stack([literal(pair[0, :, 0], pair[1, :, 0]) for pair in kernels])
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), kernels)
    torch.testing.assert_close(pair_gradient(kernels.detach(), find_table(name)), gradient)


def test_figures_follow_their_definitions() -> None:
    objectives = torch.tensor([[4.0, 4.0, 4.0], [2.0, 3.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    similarities = torch.tensor([[4.0, 1.0, 1.0], [2.0, 2.0, 3.0], [1.0, 3.0, 5.0]], dtype=torch.float64)
    found = summarize_episodes(objectives, similarities)
    pearson = [torch.corrcoef(torch.stack([objectives[:, i], similarities[:, i]]))[0, 1].item() for i in range(3)]
    assert found["correlation_mean"] == pytest.approx(sum(pearson) / 3)
    assert found["reduction_frequency"] == pytest.approx(100 / 3)
    assert (found["decrease_mean"], found["decrease_std"]) == (pytest.approx(75), None)
    assert found["increase_mean"] == pytest.approx((200 + 400) / 2)
    assert found["increase_std"] == pytest.approx(100 * 2**0.5)


@pytest.mark.parametrize(("name", "taps"), [("table1", 3), ("table2", 3), ("table6", 3)])
def test_published_correlations_are_reproduced(name: str, taps: int) -> None:
    table = find_table(name)
    for row in NUMERICAL_ROWS:
        if (row.table, row.taps) == (name, taps):
            found = run_episodes(draw_episodes(row.taps, table.padding, EPISODES, seed=0), table, row.optimizer)
            assert found["correlation_mean"] is not None
            assert row.published[0] is not None
            assert abs(found["correlation_mean"] - row.published[0]) < 0.08


def test_table_1_is_reproduced_for_16_taps_and_sgd_with_fitted_settings() -> None:
    (row,) = (row for row in NUMERICAL_ROWS if (row.table, row.taps, row.optimizer) == ("table1", 16, "sgd"))
    found = run_episodes(draw_episodes(16, "full", EPISODES, seed=0), find_table("table1"), "sgd")
    for key, published, tolerance in zip(KEYS, row.published, (0.03, 0.03, 2, 3, 3), strict=False):
        assert found[key] == pytest.approx(published, abs=tolerance)


@pytest.mark.usefixtures("few_steps")
def test_rows_have_the_keys_of_the_design_and_progress_ends_at_its_total() -> None:
    told: list[int] = []
    for row in reproduce_table("table1", episodes=10, advance=told.append)["rows"]:
        assert tuple(row) == ("N", "optimizer", "published", "measured", "fixed_norms")
        assert tuple(row["published"]) == KEYS
        assert tuple(row["measured"]) == tuple(row["fixed_norms"]) == (*KEYS, "cos_before", "cos_after")
    assert sum(told) == numerical_steps("table1")


def test_fixed_norms_stay_fixed() -> None:
    drawn = draw_episodes(9, "full", 20, seed=0)
    found = run_episodes(drawn, find_table("table2"), "sgd", fixed_norms=True)
    assert found["cos_before"] == run_episodes(drawn, find_table("table2"), "sgd")["cos_before"]
    assert found["reduction_frequency"] is not None
    assert found["reduction_frequency"] > 80


def test_every_published_row_has_its_place_in_a_table() -> None:
    assert [len([row for row in NUMERICAL_ROWS if row.table == table.name]) for table in NUMERICAL_TABLES] == [
        6,
        6,
        6,
        6,
    ]
    assert all(len(row.published) == len(KEYS) for row in NUMERICAL_ROWS)


def test_an_unknown_experiment_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'table1'"):
        find_table("tabel1")


@pytest.mark.usefixtures("few_steps")
def test_reproduce_prints_and_saves_one_document(tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim("reproduce", "table3", "--episodes", 10, "--run-dir", tmp_path, "--json", "-q")
    document = outcome.document
    assert tuple(document)[:3] == ("schema", "command", "name")
    assert len(document["rows"]) == 6
    assert document["rows"][0]["published"]["reduction_frequency"] is None
    assert "near 100 %" in document["claim"]
    assert json.loads((tmp_path / "table3.json").read_text()) == document
    assert document["note"] is None
    outcome = convsim("reproduce", "table1", "--episodes", 10, "--run-dir", tmp_path)
    assert outcome.rows[0]["correlation_published"] == "0.67 ± 0.28"
    note = json.loads((tmp_path / "table1.json").read_text())["note"]
    assert "found by trying seven settings" in note
    assert note in outcome.err
