from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from convsim_cli.machine.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_blocks_that_are_freed_and_taken_again_are_not_cleared_by_the_system_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("kept", "as it was")
    }
    assert faults["kept"] < 1000
    assert faults["as it was"] > 10 * faults["kept"]  # else there is nothing to mend any more


RETURNED = """
import sys, torch
from convsim_cli.machine.allocator import return_freed_memory
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
if sys.argv[1] == "returned":
    assert return_freed_memory()
torch.ones(1 << 24, dtype=torch.uint8)  # once it has seen a block of this size freed, glibc keeps smaller ones
kept = [torch.ones(1 << 21, dtype=torch.uint8) for _ in range(100)]
end = torch.ones(1 << 21, dtype=torch.uint8)  # keeps the heap from shrinking at its end
held = resident()
del kept
print(held - resident())
"""


@pytest.mark.skipif(platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_what_is_freed_between_blocks_in_use_goes_back_to_the_system() -> None:
    returned = {
        how: int(subprocess.run([sys.executable, "-c", RETURNED, how], capture_output=True, check=True).stdout)
        for how in ("returned", "as it was")
    }
    assert returned["returned"] > 190 << 10  # kilobytes, of 200 MB
    assert returned["as it was"] < 100 << 10  # else there is nothing to mend any more
