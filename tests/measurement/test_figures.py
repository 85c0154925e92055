from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from conftest import Convsim
from forks import run_code
from safetensors.torch import save_file

from convsim_cli.measurement.figures import FIGURES

PAGE = (Path(__file__).parents[2] / ".docs" / "measure.md").read_text()
ADD_ONE = """
import json, sys
from convsim_cli import checkpoint_measure
from convsim_cli.measurement import figures

measured = checkpoint_measure.measure_layer
checkpoint_measure.measure_layer = lambda kernel, weight, *rest: {
    **measured(kernel, weight, *rest), "largest": weight.abs().max().item()
}
figures.FIGURES += (figures.Figure("largest", "the largest weight", "weight", True, compared=True),)
from convsim_cli.cli import run

for arguments in json.loads(sys.argv[1]):
    run(arguments)
    print("----")
"""


def test_a_figure_that_is_added_to_the_table_is_seen_everywhere(tmp_path: Path) -> None:
    paths = [str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")]
    weight = torch.randn(4, 3, 3, 3)
    for path, factor in zip(paths, (1.0, 2.0), strict=True):
        save_file({"a.weight": factor * weight}, path)
    commands = [["measure", *paths, "--json"], ["measure", *paths, "--sort", "largest"], ["measure", "--figures"]]
    code, out, err = run_code(ADD_ONE, json.dumps(commands))
    assert code == 0, err
    document, table, help_, _ = out.split("----\n")
    largest = weight.abs().max().item()
    first, second = (report["layers"][0] for report in json.loads(document)["checkpoints"])
    assert (first["largest"], second["largest_change"]) == (largest, largest)
    header, *rows = (line.split("\t") for line in table.splitlines())
    assert [row[header.index("largest")] for row in rows] == [f"{largest:.6g}", f"{2 * largest:.6g}"]
    assert rows[1][header.index("largest_change")] == f"{largest:.6g}"
    assert re.search(r"largest +the largest weight", help_)


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (yes|no) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (figure.key, figure.meaning.replace("|", r"\|"), figure.unit, "yes" if figure.moves_with_scale else "no")
        for figure in FIGURES
    ]


def test_every_figure_is_explained_within_80_columns(convsim: Convsim) -> None:
    lines = convsim("measure", "--figures").out.splitlines()
    for figure in FIGURES:
        assert any(re.match(rf"{figure.key} +{re.escape(figure.meaning.split()[0])}", line) for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_table_of_figures_needs_no_torch() -> None:
    code = (
        "import sys; from convsim_cli.measurement.figures import FIGURES; print(len(FIGURES), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(FIGURES)), "False"]
