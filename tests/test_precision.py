from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from convsim_cli.precision import full_precision, tf32

NEW = hasattr(torch._C, "_get_fp32_precision_getter")  # torch ≥ 2.9
GENERAL = [("generic", "all"), ("mkldnn", "all"), ("cuda", "all")]  # what the others inherit from where they say "none"
USED = {
    "cpu": [("mkldnn", "matmul"), ("mkldnn", "conv")],
    "cuda": [("mkldnn", "matmul"), ("mkldnn", "conv"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")],
}
UNTOUCHED: dict[Any, str] = {}
MATMUL = ["highest", "high", "medium"]
GENERIC = [UNTOUCHED, {GENERAL[0]: "ieee"}, {GENERAL[0]: "tf32"}]
BACKENDS = [UNTOUCHED, {GENERAL[1]: "ieee", GENERAL[2]: "ieee"}, {GENERAL[1]: "bf16", GENERAL[2]: "tf32"}]
OPERATORS = [
    UNTOUCHED,
    {("mkldnn", "matmul"): "none", ("cuda", "matmul"): "none", ("cuda", "conv"): "none"},
    {("mkldnn", "matmul"): "ieee", ("cuda", "matmul"): "ieee", ("cuda", "conv"): "ieee", ("cuda", "rnn"): "ieee"},
    {("mkldnn", "matmul"): "bf16", ("mkldnn", "conv"): "tf32", ("cuda", "matmul"): "tf32", ("cuda", "rnn"): "none"},
]
SETTINGS = list(product(MATMUL, [False, True], *([GENERIC, BACKENDS, OPERATORS] if NEW else [])))


def write_new(values: dict[tuple[str, str], str]) -> None:
    for key, value in values.items():
        torch._C._set_fp32_precision_setter(*key, value)


def read_new() -> dict[tuple[str, str], str]:
    return {key: torch._C._get_fp32_precision_getter(*key) for key in GENERAL + USED["cuda"]} if NEW else {}


def read_own() -> dict[tuple[str, str], str]:
    """What each new switch says by itself; the general ones are "none" afterwards."""
    if not NEW:
        return {}
    found = {}
    for key in GENERAL:
        found |= {key: torch._C._get_fp32_precision_getter(*key)}
        write_new({key: "none"})
    return read_new() | found


def read_old() -> dict[str, Any]:
    readers = {
        "matmul": torch.get_float32_matmul_precision,
        "cuBLAS": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cuDNN": lambda: torch.backends.cudnn.allow_tf32,
    }
    found: dict[str, Any] = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "raises, since old and new switches disagree"
    return found


def choose(matmul: str, cudnn: bool, *new: dict[tuple[str, str], str]) -> None:
    """Set the switches as a user might, the old ones first."""
    if NEW:
        write_new(dict.fromkeys(GENERAL + USED["cuda"], "none"))
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for values in new:
        write_new(values)


@pytest.fixture(autouse=True)
def _as_torch_starts() -> Iterator[None]:
    yield
    choose("highest", True)
    if NEW:
        write_new({("mkldnn", "matmul"): "none", ("cuda", "matmul"): "none"})


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_switches_are_off_inside_and_restored_afterwards(kind: str) -> None:
    for settings in SETTINGS:
        choose(*settings)
        own = read_own()
        choose(*settings)
        before = read_new(), read_old()
        with full_precision(torch.device(kind)):
            inside = read_new()
            assert not NEW or {inside[key] for key in USED[kind]} <= {"none", "ieee"}, settings
            if kind == "cuda":
                assert read_old() == {"matmul": "highest", "cuBLAS": False, "cuDNN": False}, settings
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # raises where they disagree
                    pass
        assert (read_new(), read_old()) == before, settings
        assert read_own() == own, settings


def test_old_switches_can_be_read_inside_on_the_cpu() -> None:
    for matmul in MATMUL:
        choose(matmul, True)
        with full_precision(torch.device("cpu")):
            assert read_old() == {"matmul": "highest", "cuBLAS": False, "cuDNN": True}
        assert read_old() == {"matmul": matmul, "cuBLAS": matmul != "highest", "cuDNN": True}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_exception_inside_restores_the_switches(kind: str) -> None:
    choose("medium", True)
    before = read_new(), read_old()
    with pytest.raises(KeyError), full_precision(torch.device(kind)):
        raise KeyError
    assert (read_new(), read_old()) == before


def test_tf32_is_on_inside_off_in_full_precision_and_restored() -> None:
    for settings in SETTINGS:
        choose(*settings)
        own = read_own()
        choose(*settings)
        before = read_new(), read_old()
        with tf32(torch.device("cuda")):
            assert read_old() == {"matmul": "high", "cuBLAS": True, "cuDNN": True}, settings
            with full_precision(torch.device("cuda")):
                assert read_old() == {"matmul": "highest", "cuBLAS": False, "cuDNN": False}, settings
            assert read_old() == {"matmul": "high", "cuBLAS": True, "cuDNN": True}, settings
        assert (read_new(), read_old()) == before, settings
        assert read_own() == own, settings


def test_tf32_is_full_precision_on_the_cpu() -> None:
    choose("medium", True)
    with tf32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"


def test_autocast_is_off_inside_and_on_afterwards() -> None:
    a = torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(a.device):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_blocks_that_overlap_leave_the_switches_as_they_were() -> None:
    def looks() -> tuple[object, object]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = looks()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        first, second = (full_precision(torch.device("cuda")) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert looks() == ("highest", False)  # the second still computes
        second.__exit__(None, None, None)
        assert looks() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(str(before[0]))
        torch.backends.cudnn.allow_tf32 = bool(before[1])


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_no_operator_is_recorded_in_a_cuda_graph() -> None:
    for operator in (torch.ops.convsim.value.default, torch.ops.convsim.gradient.default):
        assert torch.Tag.cudagraph_unsafe in operator.tags
