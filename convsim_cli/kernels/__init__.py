"""Which tensors are convolution kernels, and which of their filters form pairs.

Filters form pairs only where they see the same input: all i < j of a dense layer, i < j within each group of a grouped
one. A module tells exactly (`modules`); a file holds names and shapes only, so its kernels are assumed (`guess`).
"""

from convsim_cli.kernels.guess import TensorInfo, file_kernels, is_averaged, is_optimizer_state
from convsim_cli.kernels.kernel import (
    FLOATING,
    VANISHED,
    WRAPPERS,
    Kernel,
    Patterns,
    Selection,
    Skipped,
    living_filters,
    refuse_meta,
    undone_on_failure,
)
from convsim_cli.kernels.modules import (
    ConvolutionCall,
    axes_of,
    current_kernel,
    effective_weight,
    evaluation_mode,
    is_convolution,
    kept_attributes,
    module_kernels,
    overrides_forward,
    own_weight,
    pull_back,
    reach_convolution,
    refuse_sharded,
    unwrapped,
    warn_of_unsupported,
    weight_of,
    without_wrappers,
)

__all__ = [
    "FLOATING",
    "VANISHED",
    "WRAPPERS",
    "ConvolutionCall",
    "Kernel",
    "Patterns",
    "Selection",
    "Skipped",
    "TensorInfo",
    "axes_of",
    "current_kernel",
    "effective_weight",
    "evaluation_mode",
    "file_kernels",
    "is_averaged",
    "is_convolution",
    "is_optimizer_state",
    "kept_attributes",
    "living_filters",
    "module_kernels",
    "overrides_forward",
    "own_weight",
    "pull_back",
    "reach_convolution",
    "refuse_meta",
    "refuse_sharded",
    "undone_on_failure",
    "unwrapped",
    "warn_of_unsupported",
    "weight_of",
    "without_wrappers",
]
