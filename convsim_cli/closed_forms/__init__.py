"""Closed forms: filters that are orthogonal, or whose feature maps are uncorrelated, without iterations.

In both, every filter keeps its own L2 norm, and groups are treated separately. Both go as far as the rank does: more
filters than C·N taps cannot all be orthogonal. Everything is computed in float64. A dead filter
(`kernels.living_filters`) stays bit-identical and takes part in nothing.
"""

from convsim_cli.closed_forms.decorrelation import decorrelate_, decorrelate_kernels_
from convsim_cli.closed_forms.orthogonal import orthogonalize_, orthogonalize_kernel, orthogonalize_weight_

__all__ = [
    "decorrelate_",
    "decorrelate_kernels_",
    "orthogonalize_",
    "orthogonalize_kernel",
    "orthogonalize_weight_",
]
