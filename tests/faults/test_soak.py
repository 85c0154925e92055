from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import Convsim
from safetensors.torch import save_file


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_memory_stays_flat_over_many_commands_in_one_process(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(16, 8, 3, 3), "b.weight": torch.randn(16, 16, 3, 3)}, path)
    rounds = cases(20)
    settled = 0
    for number in rounds:
        assert convsim("init", path, "--iterations", 2, "-q").code == 0
        assert convsim("measure", path, "--samples", 1, "-q").code == 0
        if number == len(rounds) // 4:
            gc.collect()
            settled = resident()
    gc.collect()
    assert resident() < 1.05 * settled
