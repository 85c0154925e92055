"""convsim: measure a convolutional network's feature-map similarity, and reduce it by changing only the kernels.

This page is the architecture. A module imports only from its own line and the lines above (tests/test_architecture.py):

    errors              what can go wrong, with exit codes
    methods, settings   the table of methods; the options of init and measure, each declared once
    device, precision   devices, CUDA graphs, progress; full float32, and values with their own gradient
    similarity          Eq. 10 of the paper in linear time, and power spectra
    objectives          the table of everything that can be minimized, Eq. 10 first
    kernels/            which tensors are kernels: `kernel`, `modules` (exact), `guess` and `neighbours` (a file)
    layers, batch_norm  run a model without side effects, a layer with another weight; batch-norm statistics
    measurement/        `figures` (the table), `kernel_figures`, `feature_maps`, `pairs`, `synthetic`, `network`
    closed_forms        filters that are orthogonal, of one DCT pattern each, or decorrelated
    minimize, penalty   Algorithm 1; Algorithm 2
    rotation            how far filters turn while a network trains
    checkpoints/        `base`, `formats` (the table) and one module per format; `atomic` and `journal` write,
                        `diagnose` and `pickle_globals` explain what cannot be read
    inputs/             images in memory, and accuracy on them; datasets and folders by name
    networks/           networks by name, checkpoints loaded into them, and what they run on
    checkpoint_init, checkpoint_measure   two library calls, which the commands `init` and `measure` show
    training/           `config` (arguments and modes), `launch`, `run`, `trainer`, `prepare`, `distributed`,
                        `comparison`
    reproduction/       the paper's numbers, numerical tables, and trained experiments
    lightning, plots    the callback for Lightning's Trainer; pictures
    cli/                one module per command; `options` and `console` are shared

What happens in a command, in order:

- `init FILE`: cli/init_command → checkpoint_init.init_checkpoint → networks/load opens the file, kernels/guess
  finds its kernels → minimize, layer by layer, with objectives and similarity → the format's `write`, through
  checkpoints/atomic → the table.
- `measure FILE`: cli/measure_command → checkpoint_measure → networks/load and kernels/guess as above →
  measurement/synthetic makes inputs and runs each layer → measurement/kernel_figures.measure_layer → the table.
  With `--arch`, networks/load fills the network, and measurement/network runs it.
- `train`: cli/train_command → training/launch checks data and network, and creates the folder → training/run prepares
  the kernels (training/prepare), trains epoch by epoch (training/trainer), saves when due, and writes the summary.
  `--resume` enters at launch.open_to_resume and continues from `state.pt`.
- `compare`, `plot`: training/comparison reads folders of runs and groups them by seed → the table, or plots.
- `reproduce`: reproduction/numerical, or reproduction/experiments, which plans runs and trains them.

Where a change goes: a method, its function in closed_forms or objectives.OBJECTIVES and its entry in methods.METHODS;
an option of init or measure, settings; of training, or a mode, training/config; a figure, figures.FIGURES and
kernel_figures.measure_layer; a format, checkpoints/formats.FORMATS; a dataset, inputs/datasets.DATASETS; a network,
networks/architectures; an arm, reproduction/published.ARMS. Help texts, checks, completion, JSON and tables read these.
`.github/CONTRIBUTING.md` goes through most of these.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convsim_cli.checkpoint_init import init_checkpoint
    from convsim_cli.checkpoint_measure import measure_checkpoint
    from convsim_cli.checkpoints.formats import open_checkpoint
    from convsim_cli.closed_forms import dct_, decorrelate_, orthogonalize_
    from convsim_cli.errors import ConvsimWarning, DivergedError, InputError
    from convsim_cli.measurement.network import measure
    from convsim_cli.minimize import minimize_, minimize_weight_
    from convsim_cli.penalty import ConvSimPenalty
    from convsim_cli.rotation import TurnMonitor
    from convsim_cli.similarity import convolutional_similarity

__version__ = "0.3.0"
__all__ = [
    "ConvSimPenalty",
    "ConvsimWarning",
    "DivergedError",
    "InputError",
    "TurnMonitor",
    "convolutional_similarity",
    "dct_",
    "decorrelate_",
    "init_checkpoint",
    "measure",
    "measure_checkpoint",
    "minimize_",
    "minimize_weight_",
    "open_checkpoint",
    "orthogonalize_",
]

_HOMES = {
    "ConvSimPenalty": "penalty",
    "ConvsimWarning": "errors",
    "DivergedError": "errors",
    "InputError": "errors",
    "TurnMonitor": "rotation",
    "convolutional_similarity": "similarity",
    "dct_": "closed_forms",
    "decorrelate_": "closed_forms",
    "measure": "measurement.network",
    "measure_checkpoint": "checkpoint_measure",
    "minimize_": "minimize",
    "init_checkpoint": "checkpoint_init",
    "minimize_weight_": "minimize",
    "open_checkpoint": "checkpoints.formats",
    "orthogonalize_": "closed_forms",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `convsim --help` needs none of them, nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"convsim_cli.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
