"""Pictures are what their suffix says, and replace nothing but such a picture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import IRREGULAR, Convsim
from matplotlib.figure import Figure
from matplotlib.image import imread

from convsim_cli.errors import InputError
from convsim_cli.plots import PICTURES, save_figure

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".svg": b"<?xml"}
SMALL = ("--arch", "cnn:4", "--dataset", "digits", "--epochs", 1, "--limit-train", 60, "--limit-test", 30, "-q")


def drawn() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 2, 3], label="a")
    figure.legend()
    return figure


@pytest.mark.parametrize("suffix", PICTURES)
def test_a_picture_is_of_the_format_that_its_suffix_says(suffix: str, tmp_path: Path) -> None:
    save_figure(drawn(), tmp_path / f"x{suffix}")
    save_figure(drawn(), tmp_path / f"X{suffix.upper()}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(MAGIC[suffix])
    assert (tmp_path / f"X{suffix.upper()}").read_bytes().startswith(MAGIC[suffix])


def test_text_in_a_pdf_and_an_svg_stays_text(tmp_path: Path) -> None:
    for suffix in (".pdf", ".svg"):
        save_figure(drawn(), tmp_path / f"x{suffix}")
    assert b"/FontFile2" in (tmp_path / "x.pdf").read_bytes()  # TrueType
    assert ">a</text>" in (tmp_path / "x.svg").read_text()


def test_a_png_has_300_dots_per_inch(tmp_path: Path) -> None:
    save_figure(drawn(), tmp_path / "x.png")
    assert imread(tmp_path / "x.png").shape[:2] == (4.8 * 300, 6.4 * 300)


@pytest.mark.parametrize("suffix", PICTURES)
def test_a_picture_replaces_one_of_its_format_with_the_same_bytes(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x{suffix}"
    path.touch()  # as tempfile leaves it
    save_figure(drawn(), path)
    first = path.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")  # another day
    save_figure(drawn(), path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("suffix", PICTURES)
@pytest.mark.parametrize("content", [b"print('mine')\n", *MAGIC.values()])
def test_a_picture_replaces_no_file_that_is_something_else(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    if content == MAGIC[suffix] and suffix != ".svg":  # any XML is not yet an SVG
        return save_figure(drawn(), path)
    with pytest.raises(
        InputError, match=rf"x{suffix}: exists and is not a {suffix[1:].upper()} picture; choose a new file"
    ):
        save_figure(drawn(), path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("command", ["plot", "measure", "reproduce"])
def test_a_command_draws_over_nothing_but_a_regular_file(
    command: str, kind: str, tmp_path: Path, convsim: Convsim
) -> None:
    path = tmp_path / "figure1.png"
    IRREGULAR[kind](path)
    before = path.lstat()
    how: dict[str, tuple[object, ...]] = {
        "plot": (tmp_path / "no-run", "-o", path),
        "measure": ("--arch", "cnn:4", "--plot", path),
        "reproduce": ("figure1", "--data-dir", tmp_path / "nowhere", "--run-dir", tmp_path),
    }
    outcome = convsim(command, *how[command])
    assert outcome.code == 2
    assert f"{path}: is {kind}; choose a new file or a .png, .pdf or .svg to replace" in outcome.error
    assert os.path.samestat(path.lstat(), before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure1.png"]


@pytest.mark.parametrize("name", ["model.safetensors", "mynets.py", "notes", "x.jpg", "/dev/convsim"])
def test_a_name_that_is_no_picture_s_is_refused_before_any_work(
    name: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(b"weights")
    for command in (("plot", "no-run", "-o", name), ("measure", "no-file", "--plot", name)):
        outcome = convsim(*command)
        assert outcome.code == 2
        assert f"{name}: expected a name that ends in .png, .pdf or .svg" in outcome.error
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"model.safetensors": b"weights"}


def test_no_folder_is_created_for_a_picture(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "new" / "x.png"
    for command in (("plot", tmp_path, "-o", path), ("measure", "--arch", "cnn:4", "--plot", path)):
        outcome = convsim(*command)
        assert (outcome.code, f"{path}: folder {path.parent} does not exist; create it first" in outcome.error) == (
            2,
            True,
        )
    assert not path.parent.exists()


def test_every_page_of_a_measurement_is_checked_before_it(tmp_path: Path, convsim: Convsim) -> None:
    (tmp_path / "x-2.png").write_text("mine")
    outcome = convsim("measure", "no-file", "nor-here", "--plot", tmp_path / "x.png")
    assert (outcome.code, "x-2.png: exists and is not a PNG picture" in outcome.error) == (2, True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x-2.png"]


@pytest.mark.slow
def test_the_commands_draw_pdf_and_svg(tmp_path: Path, convsim: Convsim) -> None:
    convsim("train", *SMALL, "--run-dir", tmp_path, "--name", "a")
    assert convsim("plot", tmp_path / "a", "-o", tmp_path / "x.pdf").code == 0
    assert convsim("measure", "--arch", "cnn:4", "--plot", tmp_path / "x.svg").code == 0
    assert (tmp_path / "x.pdf").read_bytes().startswith(MAGIC[".pdf"])
    assert b"</svg>" in (tmp_path / "x.svg").read_bytes()


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("content", ["[1]", '{"mine": 1}', '{"command": "measure"}', "no json"])
def test_reproduce_replaces_no_document_but_its_own(content: str, tmp_path: Path, convsim: Convsim) -> None:
    (tmp_path / "table2.json").write_text(content)
    outcome = convsim("reproduce", "table2", "--episodes", 2, "--run-dir", tmp_path)
    assert outcome.code == 2
    assert "table2.json: exists and was not written by convsim reproduce; choose another --run-dir" in outcome.error
    assert (tmp_path / "table2.json").read_text() == content
    (tmp_path / "table2.json").unlink()
    for _ in range(2):
        assert convsim("reproduce", "table2", "--episodes", 2, "--run-dir", tmp_path).code == 0
