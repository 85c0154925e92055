"""`convsim reproduce`: the paper's experiments, published and measured numbers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convsim_cli.cli.console import Console
from convsim_cli.cli.options import JsonOption, QuietOption, SeedOption

EXAMPLES = """\b
Examples:
  convsim reproduce table1                      # kernel orthogonality and feature maps
  convsim reproduce table2 --episodes 200       # Convolutional Similarity and feature maps, a quick look
  convsim reproduce table6 --seed 1 -q > table6.tsv
  convsim reproduce table1 --json | jq '.rows[].measured.cos_after'"""


def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="table1, table2, table3 or table6.")],
    episodes: Annotated[int, typer.Option(help="Episodes per row; the paper's are 1000.", min=2)] = 1000,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where NAME.json is saved.")] = Path("runs"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run an experiment of the paper again and show published and measured numbers side by side.

    Beside each row stands what the paper does not show: mean |cos| of the two feature maps before and after, which
    scale cannot move, and the same experiment with every kernel held at its norm. Decrease and increase are in per
    cent of the start.
    """
    from convsim_cli.experiments.numerical import find_table, numerical_steps, numerical_table
    from convsim_cli.experiments.runs import write_json

    console = Console(quiet, as_json)
    table = find_table(name)
    with console.progress(name, numerical_steps(name)) as advance:
        rows = numerical_table(name, episodes, seed, advance)
    content = {"name": name, "title": table.title, "claim": table.claim or None, "episodes": episodes, "seed": seed}
    document = console.document("reproduce", content | {"rows": rows})
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / f"{name}.json", document)
    if not as_json:
        _show(rows, console)
        console.note(
            f"{table.title}; {episodes} episodes a row" + (f"; published: {table.claim}" if table.claim else "")
        )
        console.note(f"saved {run_dir / f'{name}.json'}")


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    figures = ("correlation", "reduction", "decrease", "increase")
    columns = ["N", "optimizer", *(f"{figure}_{side}" for figure in figures for side in ("published", "measured"))]
    columns += ["cos_before", "cos_after", "cos_after_fixed_norms", "reduction_fixed_norms"]
    table = []
    for row in rows:
        cells: list[Any] = [row["N"], row["optimizer"]]
        cells += [_cell(row[side], figure) for figure in figures for side in ("published", "measured")]
        cells += [row["measured"]["cos_before"], row["measured"]["cos_after"]]
        table.append([*cells, row["fixed_norms"]["cos_after"], row["fixed_norms"]["reduction_frequency"]])
    console.table(columns, table)


def _cell(found: dict[str, float | None], figure: str) -> str | float | None:
    if figure == "reduction":
        return found["reduction_frequency"]
    mean, spread = found[f"{figure}_mean"], found[f"{figure}_std"]
    if mean is None:
        return None
    return f"{mean:.3g}" if spread is None else f"{mean:.3g} ± {spread:.2g}"
