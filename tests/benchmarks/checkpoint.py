"""`init` on a large checkpoint: seconds, bytes read and written, and peak anonymous memory.

    python tests/benchmarks/checkpoint.py --folder /var/tmp

Makes a checkpoint of 512×512×3×3 layers, about 1.2 GB, in the folder and removes it. Peak anonymous memory is what a
process of its own holds beyond that of an `init` of a tiny checkpoint, by the kernel's count (mapped file pages left
out), and is given in sizes of the largest layer. rchar and wchar are the bytes that calls read and wrote; kernels are
read through the map, which is no call. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER = (512, 512, 3, 3)
LAYERS = 127
LAYER_BYTES = 4 * 512 * 512 * 9


def watched(*command: object) -> dict[str, float]:
    """Run a command; seconds, bytes that its calls read and wrote, and peak anonymous memory, sampled each 10 ms."""
    start, peak, io = time.perf_counter(), 0, {}
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        try:
            peak = max(peak, _number(status / "status", "RssAnon") << 10)
            io = {key: max(io.get(key, 0), _number(status / "io", key)) for key in ("rchar", "wchar")}
        except OSError:
            pass  # it has just ended
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "anonymous_bytes": peak, **io}


def _number(path: Path, key: str) -> int:
    """A number of /proc; 0 where a process that has just ended no longer has it."""
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{key}:")), 0)


def init(folder: Path, layers: int, shape: tuple[int, ...], iterations: int) -> dict[str, float]:
    path = folder / "made.safetensors"
    save_file({f"layer{n}.weight": torch.randn(shape) for n in range(layers)}, path)
    try:
        return watched(
            sys.executable, "-m", "convsim_cli", "init", path, "--iterations", iterations, "--no-backup", "-q"
        )
    finally:
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where to make the checkpoint; the system's temporary one unless given"
    )
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        tiny = init(Path(folder), 1, (4, 4, 3, 3), given.iterations)
        large = init(Path(folder), LAYERS, LAYER, given.iterations)
    beyond = large["anonymous_bytes"] - tiny["anonymous_bytes"]
    found: dict[str, Any] = {
        "file_bytes": LAYERS * LAYER_BYTES,
        "iterations": given.iterations,
        **large,
        "tiny_anonymous_bytes": tiny["anonymous_bytes"],
        "beyond_tiny_in_layers": beyond / LAYER_BYTES,
    }
    print(
        json.dumps(found, indent=2) if given.json else "\n".join(f"{key}\t{value:.6g}" for key, value in found.items())
    )


if __name__ == "__main__":
    main()
