"""Training runs: arguments, the loop, evaluation, processes and the run's folder."""
