"""What glibc does with freed memory, told and untold, each in a process of its own."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch
from forks import call_in_fork

from convsim_cli.device import keep_freed_memory, return_freed_memory

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc on Linux"
)


def page_faults_of_large_blocks(kept: bool) -> int:
    """Return how often the system provides a page while blocks of 64 MB are taken and freed twenty times."""
    if kept:
        assert keep_freed_memory()
    for _ in range(20):
        torch.ones(1 << 26, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
def test_freed_blocks_are_reused_without_being_cleared() -> None:
    kept = call_in_fork(page_faults_of_large_blocks, True)
    assert kept < 1000
    assert call_in_fork(page_faults_of_large_blocks, False) > 10 * kept  # else there is nothing to gain any more


def resident() -> int:
    """Return this process's memory outside files, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


def memory_that_freed_blocks_give_back(returned: bool) -> int:
    """Return how much smaller the process becomes when 100 blocks of 2 MB below a block in use are freed."""
    if returned:
        assert return_freed_memory()
    torch.ones(1 << 24, dtype=torch.uint8)  # once it has seen a block of this size freed, glibc keeps smaller ones
    blocks = [torch.ones(1 << 21, dtype=torch.uint8) for _ in range(100)]
    end = torch.ones(1 << 21, dtype=torch.uint8)  # keeps the heap from shrinking at its end
    held = resident()
    del blocks
    given_back = held - resident()
    del end
    return given_back


def test_what_is_freed_between_blocks_in_use_goes_back_to_the_system() -> None:
    assert call_in_fork(memory_that_freed_blocks_give_back, True) > 190 << 20  # of 200 MB
    assert call_in_fork(memory_that_freed_blocks_give_back, False) < 100 << 20  # else there is nothing to gain any more
