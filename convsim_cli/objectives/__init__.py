"""Every objective that convsim can minimize, by name: its value and its gradient.

An objective is a function of the filters of one layer, in the layout of `similarity.to_filters`, and sums over groups.
"""

from convsim_cli.objectives.objective import Objective, project_, rescale_
from convsim_cli.objectives.table import OBJECTIVES, find_objective

__all__ = ["OBJECTIVES", "Objective", "find_objective", "project_", "rescale_"]
