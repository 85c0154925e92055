"""Runs of earlier versions are read, resumed and compared: their args.json is translated."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, Convsim

from convsim_cli.errors import InputError
from convsim_cli.training.config import Arguments, make_arguments
from convsim_cli.training.launch import create_run, find_run
from convsim_cli.training.run import open_run, read_results, train_run

SMALL = Arguments(
    arch="cnn:4", dataset="digits", limit_train=60, limit_test=30, batch_size=20, epochs=1, iterations=5, device="cpu"
)
V1 = {"bn_statistics": "running"}  # what version 0.1 did, and did not say
OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what it is today, and what stood there instead
    "mode orthogonal": ({"mode": "init", "method": "orthogonal"}, {"mode": "orthogonal"}),
    "mode decorrelate": (
        {"mode": "init", "method": "decorrelate", "rescale": True},
        {"mode": "decorrelate", "rescale": True},
    ),
    "objective of init": ({"mode": "init", "method": "kernel"}, {"mode": "init", "objective": "kernel"}),
    "objective of init+reg": (
        {"mode": "init+reg", "method": "kernel", "objective": "kernel"},
        {"mode": "init+reg", "objective": "kernel"},
    ),
    "objective of reg": ({"mode": "reg", "objective": "srip"}, {"mode": "reg", "objective": "srip"}),
    "rescale": ({"mode": "rescale"}, {"mode": "rescale"}),
    "pairs": ({"mode": "reg", "objective": "neighbours", **V1}, {"mode": "reg", "pairs": "neighbours"}),
    "pairs of init": ({"mode": "init", "method": "neighbours", **V1}, {"mode": "init", "pairs": "neighbours"}),
    "similarity not held": ({"mode": "reg"}, {"mode": "reg", "hold_similarity": False}),
    "pairs all": ({"mode": "init+reg", **V1}, {"mode": "init+reg", "pairs": "all"}),
}


def old(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arguments of a run as an earlier version wrote them."""
    now, then = OLD[kind]
    new = {"method", *(now.keys() - then.keys()), *(["objective"] if "pairs" in then else [])}
    return {name: value for name, value in values.items() if name not in new} | then


@pytest.mark.slow
@pytest.mark.parametrize("kind", OLD)
def test_a_run_of_before_is_read_found_compared_and_resumed(kind: str, tmp_path: Path, convsim: Convsim) -> None:
    arguments = replace(SMALL, **OLD[kind][0])
    run = create_run(arguments, tmp_path / "runs", "old")
    train_run(run)
    assert "method" not in old(asdict(arguments), kind)
    (run.folder / "args.json").write_text(json.dumps(old(asdict(arguments), kind)))
    state = torch.load(run.folder / "state.pt", weights_only=True)
    torch.save(state | {"arguments": old(state["arguments"], kind)}, run.folder / "state.pt")
    assert open_run(run.folder).arguments == arguments
    found = find_run(arguments, tmp_path / "runs")
    assert found is not None
    assert found.folder == run.folder
    train_run(create_run(replace(SMALL, bn_statistics=arguments.bn_statistics), tmp_path / "runs", "baseline"))
    groups = convsim("compare", tmp_path / "runs", "--json").document["groups"]
    (compared,) = (group for group in groups if group["arguments"]["mode"] != "baseline")
    assert compared["arguments"]["mode"] == arguments.mode
    assert compared["difference"] is not None
    whole = create_run(replace(arguments, epochs=2), tmp_path, "whole")
    train_run(whole)
    assert convsim("train", "--resume", run.folder, "--epochs", 2, "-q").code == 0
    assert [row["test_loss"] for row in read_results(run.folder)] == [
        row["test_loss"] for row in read_results(whole.folder)
    ]
    again = convsim("train", "--config", run.folder / "args.json", "--run-dir", tmp_path, "--name", "again", "-q")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again" / "args.json").read_text()) == asdict(replace(arguments, epochs=2))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "rescale", "objective": "kernel"}, "a/args.json: rescales to the norms of objective kernel"),
        ({"mode": "init", "objective": "ocnn", "preserve_norm": True, "rescale": True}, "norms of objective ocnn"),
        ({"pairs": "most"}, "a/args.json: pairs = 'most', expected all, neighbours"),
        (
            {"hold_similarity": True, "method": "cs"},
            "a/args.json: hold_similarity = True; this version reads only runs ",
        ),
        ({"hold_similarity": None, "method": "cs"}, "a/args.json: hold_similarity = None; this version"),
        ({"mode": 3}, "a/args.json: `mode` 3: expected baseline, "),
        ({"mode": "init", "objective": ["cs"]}, r"a/args.json: `method` \['cs'\]: expected cs, "),
        ({"mode": "orthogonal", "method": "cs"}, "a/args.json: `mode` orthogonal: expected baseline, init"),
    ],
)
def test_arguments_of_before_that_mean_nothing_today_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_arguments(values, Path("a/args.json"))


def test_the_runs_that_version_0_1_left_behind_are_compared(convsim: Convsim) -> None:
    runs = SHARED / "runs"
    if not (runs / "cnn1-baseline-s0").is_dir():
        pytest.skip(f"{runs} is missing: make it with convsim reproduce table5 --archs cnn1 --bn-statistics running")
    groups = convsim("compare", runs, "--json").document["groups"]
    assert {group["arguments"]["mode"] for group in groups} >= {"baseline", "init", "rescale"}
