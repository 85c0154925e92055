"""Runs side by side: groups of seeds, differences paired by seed, and their intervals."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import Convsim

from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.training.comparison import (
    RunResults,
    compare_runs,
    group_by_seed,
    holm,
    mean_interval,
    p_value,
    read_runs,
    rows_with_turns,
    student_quantile,
)
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import create_run
from convsim_cli.training.run import write_results

BASE = Arguments(dataset="digits", epochs=6)
TEST = {  # test accuracies per epoch, by seed
    "baseline": {0: [10, 20, 30, 40, 60, 50], 1: [12, 22, 32, 42, 55, 52], 2: [11, 21, 31, 41, 58, 57]},
    "init": {0: [20, 30, 50, 60, 70, 71], 1: [21, 31, 50, 64, 66, 63], 2: [20, 30, 40, 50, 61, 69]},
}


def make_run(folder: Path, name: str, accuracies: list[float], **arguments: Any) -> Path:
    run = create_run(replace(BASE, **arguments), folder, name)
    rows = [
        {"epoch": n, "train_loss": 1 / n, "train_accuracy": value + 1, "test_loss": 1.0, "test_accuracy": value}
        | {"cs": 900.0, "seconds": 1.0}
        for n, value in enumerate(accuracies, 1)
    ]
    write_results(run.folder, rows)
    return run.folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for mode, by_seed in TEST.items():
        for seed, accuracies in by_seed.items():
            make_run(tmp_path / "runs", f"{mode}-s{seed}", accuracies, mode=mode, seed=seed)  # type: ignore[arg-type]
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("freedom", "tabulated"),  # Abramowitz and Stegun, table 26.10
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_the_quantile_is_the_tabulated_one(freedom: int, tabulated: float) -> None:
    assert student_quantile(freedom) == pytest.approx(tabulated, abs=5e-4)


def test_the_quantile_is_the_one_of_scipy_for_every_small_number_of_seeds() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 200):
        assert student_quantile(freedom) == pytest.approx(float(stats.t.ppf(0.975, freedom)), rel=1e-9)


def test_one_value_has_no_interval_and_two_have_one() -> None:
    assert mean_interval([3.0]) is None
    low, high = mean_interval([1.0, 3.0]) or (0, 0)
    assert (low, high) == (pytest.approx(2 - 12.7062, abs=1e-3), pytest.approx(2 + 12.7062, abs=1e-3))


def test_runs_that_differ_only_by_seed_are_one_group_with_its_figures(runs: Path) -> None:
    content = compare_runs([runs], accuracy=60)
    assert content["baseline"] == "mode=baseline"
    baseline, init = content["groups"]
    assert (baseline["group"], init["group"]) == ("mode=baseline", "mode=init")
    assert (init["n"], init["seeds"], init["epochs"]) == (3, [0, 1, 2], 6)
    assert init["runs"] == [str(runs / f"init-s{seed}") for seed in range(3)]
    last5 = [mean(values[-5:]) for values in TEST["init"].values()]
    expected = {
        "best_test_accuracy": [71, 66, 69],
        "last_test_accuracy": [71, 63, 69],
        "mean_last5_test_accuracy": last5,
        "last_train_accuracy": [72, 64, 70],
    }
    for key, values in expected.items():
        assert init[key] == {"mean": pytest.approx(mean(values)), "std": pytest.approx(stdev(values))}
    assert init["epochs_to_accuracy"] == {
        "reached": 3,
        "mean": pytest.approx(13 / 3),
        "std": pytest.approx(stdev([4, 4, 5])),
    }
    assert baseline["epochs_to_accuracy"] == {"reached": 1, "mean": None, "std": None}


def test_the_difference_is_paired_by_seed_and_has_the_interval_of_student(runs: Path) -> None:
    baseline, init = compare_runs([runs])["groups"]
    assert baseline["difference"] is None
    found = init["difference"]
    assert (found["n"], found["seeds"]) == (3, [0, 1, 2])
    same = {"mean": 11, "low": 11, "high": 11}
    assert found["best_test_accuracy"] == {**same, "p": 0, "p_holm": 0}  # equal for every seed: no width
    differences = [71 - 50, 63 - 52, 69 - 57]
    half = 4.302653 * stdev(differences) / 3**0.5
    assert found["last_test_accuracy"] == {
        "mean": pytest.approx(mean(differences)),
        "low": pytest.approx(mean(differences) - half),
        "high": pytest.approx(mean(differences) + half),
        "p": pytest.approx(0.0439300, abs=1e-6),  # as scipy.stats.ttest_1samp has it
        "p_holm": pytest.approx(0.0439300, abs=1e-6),
    }


def test_the_probability_of_a_difference_is_that_of_students_t_test() -> None:
    for values, p in (([1.0, 2.0, 3.0, 5.0], 0.0485669), ([-0.5, 0.5, 1.5], 0.477767), ([0.0, 0.0], 1.0)):
        assert p_value(values) == pytest.approx(p, abs=1e-6)
    assert p_value([3.0]) is None


def test_holms_correction_is_that_of_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_differences_are_corrected_for_the_number_of_groups(runs: Path) -> None:
    for seed in range(3):
        make_run(runs, f"other-{seed}", [50.0 + seed] * 6, mode="rescale", seed=seed)
    groups = [group["difference"] for group in compare_runs([runs])["groups"] if group["difference"]]
    values = [group["last_test_accuracy"]["p"] for group in groups]
    assert len(values) == 2
    assert [group["last_test_accuracy"]["p_holm"] for group in groups] == holm(values)
    assert groups[0]["last_test_accuracy"]["p_holm"] == pytest.approx(2 * min(values))


def test_only_common_seeds_are_paired_and_one_pair_has_no_interval(runs: Path) -> None:
    make_run(runs, "other", [50.0] * 6, mode="rescale", seed=2)
    make_run(runs, "strange", [50.0] * 6, mode="reg", seed=9)
    groups = {group["group"]: group for group in compare_runs([runs])["groups"]}
    one, none = groups["mode=rescale"]["difference"], groups["mode=reg"]["difference"]
    assert one["seeds"] == [2]
    assert one["best_test_accuracy"] == {"mean": 50 - 58, **dict.fromkeys(("low", "high", "p", "p_holm"))}
    assert groups["mode=rescale"]["best_test_accuracy"]["std"] is None
    assert (none["n"], none["best_test_accuracy"]["mean"]) == (0, None)


@pytest.mark.parametrize(("seeds", "said"), [("*", "with 95 % intervals"), ("0", "intervals need two seeds")])
def test_intervals_are_announced_only_where_there_are_some(
    seeds: str, said: str, runs: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convsim_cli.cli.console.Console.is_screen", True)
    assert said in " ".join(convsim("compare", *runs.glob(f"*-s{seeds}")).err.split())
    assert "differences" not in convsim("compare", *runs.glob("baseline-s*")).err  # there is nothing to compare


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([{"lr": 0.01}, {"lr": 0.1}], ["lr=0.01", "lr=0.1"]),
        ([{}, {"mode": "init", "preserve_norm": True}], ["mode=baseline", "mode=init, preserve_norm=true"]),
        ([{}, {"lr": 0.1}, {"momentum": 0.9}], ["lr=0.01", "lr=0.1", "momentum=0.9"]),
        ([{"mode": "reg"}], ["mode=reg"]),
        ([{}, {"limit_train": 50}], ["limit_train=none", "limit_train=50"]),
        ([{}, {"epochs": 50, "seed": 1}], ["mode=baseline"]),
        (
            [{}, *({"schedule": "cosine", "epochs": n} for n in (6, 7))],
            ["schedule=constant"] + [f"epochs={n}, schedule=cosine" for n in (6, 7)],
        ),
        ([{"device": "cuda:0"}, {"device": "cuda:1", "seed": 1}], ["mode=baseline"]),
        ([{}, {"lr": 0.0123456}, {"lr": 2e-5}], ["lr=0.01", "lr=0.0123", "lr=2e-05"]),
        ([{}, {"lr": 0.0123456}, {"lr": 0.0123457}], ["lr=0.01", "lr=0.0123456", "lr=0.0123457"]),
        ([{"data_dir": "a"}, {"data_dir": "b", "seed": 1}], ["mode=baseline"]),
    ],
)
def test_groups_are_named_by_the_arguments_in_which_they_differ(
    settings: list[dict[str, Any]], names: list[str], tmp_path: Path
) -> None:
    for number, arguments in enumerate(settings):
        make_run(tmp_path, f"run{number}", [50.0] * 6, **arguments)
    assert [group.name for group in group_by_seed(read_runs([tmp_path]))] == names


def test_the_baseline_is_a_group_or_the_group_of_a_run(runs: Path) -> None:
    for name in ("mode=init", "init-s1", str(runs / "init-s1"), f"{runs / 'init-s1'}/"):
        content = compare_runs([runs], name)
        assert content["baseline"] == "mode=init"
        assert content["groups"][0]["difference"]["last_test_accuracy"]["mean"] < 0
    with pytest.raises(InputError, match=r"`baseline` 'mode=inti': no such group or run; did you mean 'mode=init'\?"):
        compare_runs([runs], "mode=inti")


def test_some_of_a_groups_settings_name_it_where_they_are_its_own(runs: Path) -> None:
    make_run(runs, "large", [50.0] * 6, lr=0.1, seed=1)
    make_run(runs, "larger", [50.0] * 6, lr=0.2, seed=1, mode="init")
    assert compare_runs([runs], "lr=0.1")["baseline"] == "mode=baseline, lr=0.1"
    assert compare_runs([runs], "lr=0.2, mode=init")["baseline"] == "mode=init, lr=0.2"
    assert compare_runs([runs], "mode=init")["baseline"] == "mode=init"  # the one of that very name
    make_run(runs, "also large", [50.0] * 6, lr=0.1, seed=1, mode="init")
    with pytest.raises(InputError, match=r"matches 2 groups \(mode=.*, lr=0.1; mode=.*, lr=0.1\)"):
        compare_runs([runs], "lr=0.1")
    with pytest.raises(InputError, match=r"no such group or run; choose from mode=.*; mode="):
        compare_runs([runs], "momentum=9")


def test_a_run_that_is_there_twice_counts_once_with_a_warning(runs: Path, tmp_path: Path) -> None:
    alone = compare_runs([runs])
    make_run(tmp_path / "twice", "again", [99.0] * 6, seed=1)
    with pytest.warns(ConvsimWarning, match=r"left out: .*again: has the same arguments and seed as .*baseline-s1$"):
        assert compare_runs([runs, tmp_path / "twice"]) == alone


def test_without_a_single_baseline_there_are_no_differences(tmp_path: Path) -> None:
    for lr in (0.1, 0.3):
        make_run(tmp_path, f"run-{lr}", [50.0] * 6, lr=lr)
    content = compare_runs([tmp_path])
    assert content["baseline"] is None
    assert [group["difference"] for group in content["groups"]] == [None, None]
    make_run(tmp_path, "usual", [50.0] * 6)
    assert compare_runs([tmp_path])["baseline"] == "lr=0.01"


def test_finished_runs_of_other_lengths_are_groups_of_their_own(runs: Path) -> None:
    make_run(runs, "longer", [50.0] * 8, epochs=8, seed=5)
    names = [group["group"] for group in compare_runs([runs])["groups"]]
    assert "mode=baseline, epochs=8" in names
    part = make_run(runs, "part", [50.0] * 2, seed=7)
    with pytest.warns(ConvsimWarning, match=r"part: has done 2 of 6 epochs, other runs have done 8; .* `epochs` 2"):
        assert [group["group"] for group in compare_runs([runs])["groups"]] == names
    content = compare_runs([runs], epochs=2)
    assert {group["epochs"] for group in content["groups"]} == {2}
    assert (
        next(group for group in content["groups"] if group["group"] == "mode=init")["best_test_accuracy"]["mean"] < 31
    )
    with pytest.raises(InputError, match=r"part: has done 2 epochs, fewer than `epochs` 3"):
        compare_runs([part], epochs=3)
    rmtree(part)
    make_run(runs, "long", [50.0] * 9, epochs=20, seed=6)
    with pytest.warns(ConvsimWarning, match=r"long: has done 9 of 20 epochs, other runs have done 8; "):
        compare_runs([runs])


def test_runs_under_way_on_other_images_take_no_table_away(runs: Path) -> None:
    for seed, done in ((0, 2), (1, 3)):
        make_run(runs, f"cifar-{seed}", [50.0] * done, dataset="cifar10", seed=seed)
    with pytest.warns(ConvsimWarning) as warned:
        groups = compare_runs([runs])["groups"]
    assert [group["group"] for group in groups] == ["mode=baseline", "mode=init"]
    assert [str(each.message).partition(" has done ")[2][:6] for each in warned] == ["2 of 6", "3 of 6"]


def test_runs_that_cannot_be_compared_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for name, said in (
        ("run", r"it does not exist; did you mean .*/runs\?$"),
        ("file", "it is a file"),
        ("runs", "no readable args.json), and it holds none"),
    ):
        with pytest.raises(InputError, match=r"not a run's folder.*" + said.replace("json)", r"json\)")):
            compare_runs([tmp_path / name])
    empty = make_run(tmp_path, "empty", [], seed=8)
    with pytest.raises(InputError, match="has no finished epoch yet"):
        compare_runs([empty])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "plot"])
@pytest.mark.parametrize(
    "kind", ["no epoch", "no args.json", "later version", "pipe", "nan", "cut", "a folder", "broken link"]
)
def test_a_run_that_cannot_be_read_is_named_and_left_out(
    command: str, kind: str, runs: Path, convsim: Convsim, tmp_path: Path
) -> None:
    folder = make_run(runs, "odd", [] if kind == "no epoch" else [50.0] * 6, seed=9)
    arguments, results = folder / "args.json", folder / "results.csv"
    text = results.read_text()
    {
        "no epoch": lambda: None,
        "no args.json": arguments.unlink,
        "later version": lambda: arguments.write_text('{"color": 1}'),
        "pipe": lambda: (results.unlink(), os.mkfifo(results)),
        "nan": lambda: results.write_text(text.replace("50.0", "nan")),
        "cut": lambda: results.write_text(text[:-9]),
        "a folder": lambda: (rmtree(folder), folder.mkdir(), arguments.mkdir()),
        "broken link": lambda: (rmtree(folder), folder.symlink_to("nowhere")),
    }[kind]()
    how = ["--json"] if command == "compare" else ["--json", "-o", tmp_path / "a.png"]
    outcome = convsim(command, runs, *how)
    assert outcome.code == 0, outcome.err
    assert f"convsim: warning: left out: {folder}" in outcome.err
    named = outcome.document["groups"] if command == "compare" else [outcome.document]
    assert sum(len(group["runs"]) for group in named) == 6
    alone = convsim(command, folder, *how)
    assert (alone.code, str(folder) in alone.error) == (2, True)


def test_runs_on_other_test_images_are_tables_of_their_own(
    runs: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        make_run(runs, f"cifar-{seed}", [70.0 + seed] * 6, dataset="cifar10", seed=seed)
        make_run(runs, f"cifar-init-{seed}", [72.0 + seed] * 6, dataset="cifar10", mode="init", seed=seed)
    make_run(runs, "few", [50.0] * 6, limit_test=5, seed=8)
    groups = compare_runs([runs])["groups"]
    names = [(group["data"], group["group"], group["n"], group["baseline"]) for group in groups]
    assert sorted(names, key=str) == [
        ("cifar10", "mode=baseline", 2, "mode=baseline"),
        ("cifar10", "mode=init", 2, "mode=baseline"),
        ("digits", "mode=baseline", 3, "mode=baseline"),
        ("digits", "mode=init", 3, "mode=baseline"),
        ("digits, first 5 test images", "mode=baseline", 1, "mode=baseline"),
    ]
    gains = {
        group["data"]: group["difference"]["best_test_accuracy"]["mean"] for group in groups if group["difference"]
    }
    assert gains == {"cifar10": pytest.approx(2.0), "digits": pytest.approx(11.0)}
    monkeypatch.setattr("convsim_cli.cli.console.Console.is_screen", True)
    shown = convsim("compare", runs)
    assert shown.out.count("group") == 3
    assert [line for line in shown.err.splitlines() if line.startswith("on ")] == [
        "on digits:",
        "on cifar10:",
        "on digits, first 5 test images:",
    ]
    with pytest.raises(InputError, match="no such group or run; did you mean 'cifar-init-"):
        compare_runs([runs], "cifar-init-9")
    found = compare_runs([runs], "cifar-init-0")["groups"]
    assert {(group["data"], group["baseline"]) for group in found if group["baseline"]} == {("cifar10", "mode=init")}


def test_a_folder_of_images_is_told_by_its_images_and_not_by_its_place(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convsim_cli.cli.console.Console.is_screen", True)
    for seed in (0, 1):
        make_run(tmp_path, f"a{seed}", [50.0 + seed] * 6, seed=seed, dataset="folder:/old", folder_digest="a" * 64)
        moved: dict[str, Any] = {"dataset": "folder:/new", "folder_digest": "a" * 64, "seed": seed}
        make_run(tmp_path, f"b{seed}", [52.0] * 6, mode="init", **moved)
    shown = convsim("compare", tmp_path)
    assert (shown.out.count("group"), "on folder" in shown.err) == (1, False)
    assert "+1.50" in shown.out
    assert "different images" not in convsim("plot", tmp_path, "-o", tmp_path / "x.png").err
    make_run(tmp_path, "replaced", [90.0] * 6, dataset="folder:/old", folder_digest="b" * 64)
    groups = compare_runs([tmp_path])["groups"]
    assert {group["data"] for group in groups} == {"folder:/old", "folder:/old, digest bbbbbbbb"}
    assert convsim("compare", tmp_path).out.count("group") == 2
    assert "folder:/old, digest bbbbbbbb" in convsim("plot", tmp_path, "-o", tmp_path / "x.png").err


@pytest.mark.parametrize("wrong", [{"accuracy": float("nan")}, {"accuracy": 101.0}, {"epochs": 0}])
def test_a_number_out_of_range_is_an_error_that_names_it(wrong: dict[str, Any], runs: Path) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` .*: expected a number"):
        compare_runs([runs], **wrong)


def test_the_turns_of_many_epochs_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0

    class Watched(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            nonlocal looked_at
            looked_at += key == "epoch"
            return super().__getitem__(key)

    layers = [
        Watched(epoch=n, layer=f"{n}", turned=n + layer, turn_per_step=None) for n in range(50) for layer in range(3)
    ]
    monkeypatch.setattr("convsim_cli.training.comparison.read_layers", lambda _: layers)
    rows = rows_with_turns(RunResults(tmp_path, BASE, [{"epoch": epoch} for epoch in range(51)]))
    assert rows[7] == {"epoch": 7, "turned": 8, "turn_per_step": None}
    assert rows[50] == {"epoch": 50, "turned": None, "turn_per_step": None}
    assert looked_at <= 2 * len(layers)


def test_a_run_that_is_named_twice_counts_once(runs: Path) -> None:
    assert [group["n"] for group in compare_runs([runs, runs / "init-s1"])["groups"]] == [3, 3]


def test_a_pipe_gets_every_figure_and_json_one_document(runs: Path, convsim: Convsim) -> None:
    outcome = convsim("compare", runs, "--accuracy", 60)
    assert outcome.code == 0
    _, init = outcome.rows
    assert (init["group"], init["n"], init["pairs"]) == ("mode=init", "3", "3")
    assert float(init["best_test_accuracy"]) == pytest.approx(68.6667)
    assert (init["best_test_accuracy_difference"], init["best_test_accuracy_difference_low"]) == ("11", "11")
    assert "differences from mode=baseline, paired by seed" in outcome.err
    document = convsim("compare", runs, "--json", "-q").document
    assert (document["schema"], document["command"]) == (2, "compare")
    assert document["version"]
    refused = convsim("compare", runs, "--baseline", "mode=inti")
    assert (refused.code, refused.error.startswith("convsim: error: --baseline 'mode=inti'")) == (2, True)


def test_settings_that_a_mode_does_not_use_make_no_other_group(tmp_path: Path) -> None:
    assert Arguments(init_lr=0.5, iterations=7, beta=0.5).identity() == Arguments().identity()
    assert Arguments(mode="init", iterations=7).identity() != Arguments(mode="init").identity()
    assert Arguments(mode="rescale", init_lr=0.5).identity() != Arguments(mode="rescale").identity()
    reg = replace(BASE, mode="reg", beta=0.5)
    found = group_by_seed([RunResults(tmp_path, arguments, []) for arguments in (BASE, reg)])
    assert [group.name for group in found] == ["mode=baseline", "mode=reg, beta=0.5"]


def test_the_screen_says_how_many_seeds_are_paired(
    runs: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convsim_cli.cli.console.Console.is_screen", True)
    rmtree(runs / "baseline-s2")
    assert "] (2 pairs)" in convsim("compare", runs, "--wide").out
    rmtree(runs / "baseline-s1")
    rmtree(runs / "init-s0")
    assert "mode=init: has no seed in common with mode=baseline" in convsim("compare", runs).err


def test_what_a_run_does_not_use_gives_a_group_no_name(tmp_path: Path) -> None:
    both = [replace(BASE, epochs=30), replace(BASE, epochs=30, schedule="cosine")]
    found = group_by_seed([RunResults(tmp_path, arguments, []) for arguments in both])
    assert [group.name for group in found] == ["schedule=constant", "schedule=cosine"]
