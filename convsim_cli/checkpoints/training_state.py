"""Which names in a checkpoint belong to training, not to the network: optimizer state and averaged copies."""

from __future__ import annotations

import re

_OPTIMIZER = re.compile(r"optimi[sz]er|(?<![a-z])optims?(?![a-z])", re.IGNORECASE)
# Tensors that torch's optimizers keep per parameter, under names that nothing else has.
_MOMENTS = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_avg_diff",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "mu_product",
        "row_var",
        "col_var",
        "step_size",
        "previous_grad",
        "step",
    }
)


def is_optimizer_state(name: str) -> bool:
    """Return whether a tensor or a container of this name, `a.b.c`, belongs to an optimizer."""
    return _OPTIMIZER.search(name) is not None or name.rpartition(".")[2] in _MOMENTS
