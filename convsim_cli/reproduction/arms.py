"""The arms of Table 5 and Figures 1 to 3: the paper's, and those that say where a gain comes from.

One entry in `ARMS` is all that an arm takes. Nothing here imports torch, so that `convsim reproduce --help` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from convsim_cli.errors import InputError, did_you_mean

SETS = {
    "published": "the paper's arms",
    "controls": "arms that say where a gain comes from",
    "peers": "other objectives in the place of L_CS",
    "momentum": "with momentum 0.9, as in the authors' public code",
}
ALL = "all"
RAW_INIT_FACTOR = (
    0.07  # mean ‖K_i‖ after 500 iterations of raw init over before: 0.068 in CNN1's layers after the first
)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    set: one of `SETS`. settings: arguments of `train` that differ from the baseline's. published: top test accuracy in
    per cent by network, from Table 5 and the text of section 4.2. usual: whether it runs unless arms are chosen.
    """

    name: str
    set: str
    settings: dict[str, Any]
    published: dict[str, float] = field(default_factory=dict)
    usual: bool = False


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("baseline", "published", {}, {"cnn1": 74.66, "cnn2": 76.87, "cnn:512": 79.78}, usual=True),
        Arm("init", "published", {"mode": "init"}, {"cnn1": 79.16, "cnn2": 82.33}, usual=True),
        Arm("reg", "published", {"mode": "reg"}, {"cnn1": 77.16, "cnn2": 80.00}, usual=True),
        Arm("rescale", "controls", {"mode": "rescale"}, usual=True),
        Arm("rescale-0.07", "controls", {"mode": "rescale", "factor": RAW_INIT_FACTOR}),
        Arm("init-norm", "controls", {"mode": "init", "preserve_norm": True}, usual=True),
        Arm("init-norm-rescaled", "controls", {"mode": "init", "preserve_norm": True, "rescale": True}),
        Arm("reg-norm", "controls", {"mode": "reg", "preserve_norm": True}),
        Arm("orthogonal", "controls", {"mode": "orthogonal"}),
        Arm("decorrelate", "controls", {"mode": "decorrelate"}),
        Arm("baseline-lr0.1", "controls", {"lr": 0.1}),
        Arm("reg-auto", "peers", {"mode": "reg", "beta": "auto"}),
        *(
            Arm(f"reg-{objective}", "peers", {"mode": "reg", "objective": objective, "beta": "auto"})
            for objective in ("kernel", "ocnn", "srip", "orthoreg", "neighbours")
        ),
        Arm("baseline-m0.9", "momentum", {"momentum": 0.9}),
        Arm("init-m0.9", "momentum", {"mode": "init", "momentum": 0.9}),
        Arm("reg-m0.9", "momentum", {"mode": "reg", "momentum": 0.9}),
        Arm("init-norm-m0.9", "momentum", {"mode": "init", "preserve_norm": True, "momentum": 0.9}),
        Arm(
            "init-norm-held-m0.9",
            "momentum",
            {"mode": "init", "preserve_norm": True, "hold_similarity": True, "momentum": 0.9},
        ),
    )
}


def arms_of(set_name: str) -> list[str]:
    """Return the names of the arms of a set."""
    return [arm.name for arm in ARMS.values() if arm.set == set_name]


def choose_arms(names: Sequence[str] | None) -> list[Arm]:
    """Return the arms that names of arms, of sets, and `all` stand for, each once; the usual ones for None.

    Raises InputError for an unknown name.
    """
    if names is None:
        return [arm for arm in ARMS.values() if arm.usual]
    chosen: dict[str, Arm] = {}
    for name in names:
        if name not in (ALL, *SETS, *ARMS):
            raise InputError(f"unknown arm {name!r}: {did_you_mean(name, (*ARMS, *SETS, ALL))}")
        chosen |= {arm.name: arm for arm in ARMS.values() if name in (ALL, arm.set, arm.name)}
    return list(chosen.values())
