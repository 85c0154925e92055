from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convsim_cli.errors import InputError
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.reproduction import published as paper
from convsim_cli.reproduction.experiments import (
    EXPERIMENTS,
    Choices,
    Outcome,
    find_experiment,
    plan_cells,
    reductions,
    summarize,
)
from convsim_cli.reproduction.published import ARMS, SETS
from convsim_cli.training.config import Arguments
from convsim_cli.training.run import Run

BASE = Arguments()


def outcome(tests: list[float], trains: list[float]) -> Outcome:
    rows = [
        {"epoch": epoch, "test_accuracy": test, "train_accuracy": train, "train_loss": 1.0, "cs": 9.0, "seconds": 2.0}
        for epoch, (test, train) in enumerate(zip(tests, trains, strict=True), 1)
    ]
    return Outcome(Run(Path("runs/x"), BASE), rows)


def test_table5_is_every_published_row_and_two_controls() -> None:
    cells = plan_cells(find_experiment("table5"), Choices(BASE))
    usual = ["baseline", "init", "reg", "rescale", "init-norm"]
    assert [(c.labels["arch"], c.labels["arm"]) for c in cells] == [(n, arm) for n in ("cnn1", "cnn2") for arm in usual]
    published = {(arch, arm.name) for arm in ARMS.values() for arch in arm.published} - {("cnn:512", "baseline")}
    assert published < {(cell.labels["arch"], cell.labels["arm"]) for cell in cells}


def test_arms_come_in_sets_by_name_and_all_at_once() -> None:
    table5 = find_experiment("table5")

    def arms(*names: str) -> list[str]:
        return [cell.labels["arm"] for cell in plan_cells(table5, Choices(BASE, archs=("cnn1",), arms=names))]

    assert arms("published") == ["baseline", "init", "reg"]
    rescaling, others = ["rescale", "rescale-0.07"], ["reg-norm", "orthogonal", "decorrelate", "baseline-lr0.1"]
    assert arms("controls") == [*rescaling, "init-norm", "init-norm-rescaled", *others]
    assert arms("momentum") == ["baseline-m0.9", "init-m0.9", "reg-m0.9", "init-norm-m0.9"]
    peers = ["reg-auto", "reg-kernel", "reg-ocnn", "reg-srip", "reg-orthoreg", "reg-neighbours"]
    assert arms("peers", "init", "peers", "reg-kernel") == [*peers, "init"]
    assert all(ARMS[name].settings["beta"] == "auto" for name in peers)
    assert arms("all") == list(ARMS)
    assert SETS == ("published", "controls", "peers", "momentum")
    cells = plan_cells(table5, Choices(BASE, arms=("all",)))
    arguments = {cell.jobs[0].stem: cell.jobs[0].arguments for cell in cells}
    assert all(how.epochs == 100 and how.batch_size == 512 for how in arguments.values())
    assert {how.momentum for stem, how in arguments.items() if "m0.9" not in stem} == {0}
    assert arguments["cnn2-init-norm-rescaled-s0"].preserve_norm
    assert arguments["cnn2-init-norm-rescaled-s0"].rescale
    assert arguments["cnn1-baseline-lr0.1-s0"].lr == 0.1
    assert arguments["cnn1-reg-neighbours-s0"].objective == "neighbours"


def test_the_wide_network_runs_on_request_with_its_baseline_only() -> None:
    table5 = find_experiment("table5")
    cells = plan_cells(table5, Choices(BASE, archs=("cnn1", "cnn:512"), seeds=2))
    wide = [cell for cell in cells if cell.labels["arch"] == "cnn:512"]
    assert [cell.labels["arm"] for cell in wide] == ["baseline"]
    assert [job.stem for job in wide[0].jobs] == ["cnn512-baseline-s0", "cnn512-baseline-s1"]
    (row,) = table5.rows([(wide[0], [outcome([1], [1])])])
    assert row["published"] == {"test_accuracy": 79.78}


def test_a_network_of_your_own_runs_with_the_usual_arms() -> None:
    cells = plan_cells(find_experiment("table5"), Choices(BASE, archs=("cnn:32",)))
    assert [cell.labels["arm"] for cell in cells] == list(paper.USUAL_ARMS)


def test_every_seed_is_checked_before_the_first_run() -> None:
    with pytest.raises(InputError, match="`seed` 4294967296: expected a whole number from 0 to 4294967295"):
        plan_cells(find_experiment("table5"), Choices(replace(BASE, seed=2**32 - 1), seeds=2))


def test_figures_1_to_3_are_of_table_5s_runs_and_figure_5_shares_figure_4s() -> None:
    table, *figures = (
        plan_cells(find_experiment(name), Choices(BASE)) for name in ("table5", "figure1", "figure2", "figure3")
    )
    assert all([cell.jobs for cell in figure] == [cell.jobs for cell in table] for figure in figures)
    grid, sweep = (
        {cell.jobs for cell in plan_cells(find_experiment(name), Choices(BASE))} for name in ("figure4", "figure5")
    )
    assert len(grid & sweep) == 2  # I = 0 and I = 200 at lr 0.01, batch 64
    assert len(sweep) == len(paper.FIGURE_5) == 12


def test_figures_over_seeds_are_means_with_their_spread() -> None:
    found = summarize([outcome([50, 70, 60], [90, 99, 100]), outcome([50, 60, 66], [99, 99.5, 99])])
    assert (found["best_test_accuracy"], found["last_test_accuracy"]) == (68, 63)
    assert found["best_test_accuracy_std"] == pytest.approx(2.8284, abs=1e-4)
    assert found["mean_last5_test_accuracy"] == pytest.approx((60 + 176 / 3) / 2)
    assert (found["epochs_to_99"], found["cs"], found["seconds"]) == (1.5, 9, 6)
    assert (found["seeds"], found["epochs"], found["diverged"]) == (2, 3, 0)


def test_undefined_figures_are_null() -> None:
    found = summarize([outcome([50], [90]), outcome([60], [99])])
    assert found["epochs_to_99"] is None
    assert summarize([outcome([50], [90])])["best_test_accuracy_std"] is None
    died = summarize([Outcome(Run(Path("x"), BASE), [], "diverged"), outcome([60], [99])])
    assert (died["best_test_accuracy"], died["seconds"], died["diverged"], died["epochs"]) == (None, None, 1, 0)


def test_the_gain_of_figure_4_is_init_less_baseline() -> None:
    experiment = find_experiment("figure4")
    cells = plan_cells(experiment, Choices(BASE, lrs=(0.001,), batch_sizes=(128,)))
    (row,) = experiment.rows(list(zip(cells, [[outcome([40], [40])], [outcome([55], [50])]], strict=True)))
    assert row["published"] == {"gain": 20.0}
    assert row["measured"]["gain"] == 15
    assert (row["measured"]["baseline"]["best_test_accuracy"], row["measured"]["init"]["best_test_accuracy"]) == (
        40,
        55,
    )


def test_reductions_are_named_and_a_full_experiment_has_none() -> None:
    data = Dataset(
        "x", *(Split(torch.zeros(n, 1, 1, 3), torch.zeros(n)) for n in (50_000, 10_000)), 10, (0,) * 3, (1,) * 3
    )
    assert all(reductions(experiment, Choices(BASE), data) == [] for experiment in EXPERIMENTS)
    limited = Arguments(limit_train=5000, limit_test=10_000)
    small = Choices(limited, epochs=7, archs=("cnn1",), arms=("baseline", "controls"))
    assert reductions(find_experiment("table5"), small, data) == [
        "7 of 100 epochs",
        "5,000 of 50,000 train images",
        "without cnn2",
        "without init, reg",
    ]
    assert reductions(find_experiment("figure5"), Choices(BASE, iterations=paper.FIGURE_5[:-2]), data) == [
        "without I = 180, 200"
    ]


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("table5", {"arms": ("innit",)}, "unknown arm 'innit': did you mean 'init'"),
        ("table5", {"arms": ("peer",)}, "unknown arm 'peer': did you mean 'peers'"),
        ("table5", {"lrs": (0.1,)}, "table5 has no `lrs`"),
        ("figure5", {"batch_sizes": (64,)}, "figure5 has no `batch_sizes`"),
        ("figure4", {"lrs": (-1.0,)}, "`lr` -1.0: expected a number above 0"),
    ],
)
def test_choices_without_a_use_are_refused(name: str, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_cells(find_experiment(name), Choices(BASE, **choices))


def test_an_unknown_experiment_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'figure5'"):
        find_experiment("figur5")
