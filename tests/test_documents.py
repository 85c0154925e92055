from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, Convsim

from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.similarity import convolutional_similarity

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / ".docs").glob("*.md")), ROOT / ".github" / "CONTRIBUTING.md"]
DOCUMENTS = {file.name: file.read_text() for file in FILES}
README, PAGES = DOCUMENTS["README.md"], "\n".join(DOCUMENTS.values())
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)
EXECUTED = ("minimize_(", "clusters", "import lightning")  # a word of each example that a test below runs


def block(word: str) -> str:
    """The one example that has a word in it."""
    (found,) = (code for code in BLOCKS if word in code)
    return found


def anchors(page: str) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_example_in_python_is_executed() -> None:
    assert sorted(map(block, EXECUTED)) == sorted(BLOCKS)


def test_the_librarys_example_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("minimize_("), {})
    assert f"```text\n{capsys.readouterr().out}```" in README


@pytest.mark.slow
def test_the_example_of_duplicates_gives_the_accuracies_that_are_claimed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = SHARED / "runs"
    if not (runs / "cnn1-baseline-s0").is_dir():
        pytest.skip(f"{runs} is missing: make it with convsim train --bn-statistics running")
    (tmp_path / "runs").symlink_to(runs)
    (tmp_path / "data").symlink_to(data_dir)
    monkeypatch.chdir(tmp_path)
    exec(block("clusters"), {})
    trained, without = (f"{float(value):.2f} %" for value in capsys.readouterr().out.split())
    assert (trained, without) == ("73.06 %", "72.50 %")
    assert {trained, without} <= set(re.findall(r"[\d.]+ %", DOCUMENTS["measure.md"]))


@pytest.mark.filterwarnings("ignore")
def test_the_callback_for_lightning_adds_the_gradient_of_the_penalty(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    found: dict[str, Any] = {}
    exec(block("import lightning"), found)

    class Network(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(1, 4, 3)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return 0 * self.convolution(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1)

    network = Network()
    before = network.convolution.weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(convolutional_similarity(before), before)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=[found["LowerSimilarity"]()],
        **silent,
    )
    trainer.fit(network, torch.utils.data.DataLoader(torch.randn(2, 1, 8, 8), batch_size=2))
    torch.testing.assert_close(network.convolution.weight.detach(), (before - 1e-3 * gradient).detach())


@pytest.mark.filterwarnings("ignore")
def test_the_hugging_face_trainer_takes_the_penalty_where_the_page_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="needs pip install transformers accelerate")

    class LowerSimilarity(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, *_: Any, model: torch.nn.Module, **others: Any) -> None:
            self.penalty = ConvSimPenalty(model)

        def on_pre_optimizer_step(self, *_: Any, **others: Any) -> None:
            self.penalty.add_gradient_(1e-3)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(1, 4, 3)

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": 0 * self.convolution(pixel_values).sum()}

    network = Network()
    before = network.convolution.weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(convolutional_similarity(before), before)
    options = {"max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0, "optim": "sgd", "use_cpu": True}
    how = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], disable_tqdm=True, **options)
    images = [{"pixel_values": torch.randn(1, 8, 8)} for _ in range(2)]
    transformers.Trainer(model=network, args=how, train_dataset=images, callbacks=[LowerSimilarity()]).train()
    torch.testing.assert_close(network.convolution.weight.detach(), (before - 1e-3 * gradient).detach())


def test_the_main_command_is_the_one_of_the_help(convsim: Convsim) -> None:
    command = "convsim init --arch cnn1 --preserve-norm --probe natural -o model.safetensors"
    assert f"pip install -e . && {command}" in README
    assert command in convsim("--help").out


def test_the_readme_can_be_read_in_ten_minutes() -> None:
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", file.read_text()):
        path, _, anchor = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("command", ["init", "measure", "train", "compare", "reproduce", "plot"])
def test_every_option_that_the_documents_name_exists(command: str, convsim: Convsim) -> None:
    known = set(re.findall(r"--[a-z][\w-]*", convsim(command, "--help-all").out))
    for line in re.findall(rf"convsim {command} ([^`|\n]*)", PAGES.replace("\\\n", "")):
        assert set(re.findall(r"--[a-z][\w-]*", line)) <= known, line


def test_the_columns_that_the_pipe_cuts_are_name_and_ncs(convsim: Convsim) -> None:
    assert "| cut -f 1,7 " in DOCUMENTS["reliability.md"]
    columns = convsim("measure", "--arch", "cnn:4", "--samples", 1).out.splitlines()[0].split("\t")
    assert (columns[0], columns[6]) == ("name", "ncs")
