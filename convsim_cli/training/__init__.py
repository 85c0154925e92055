"""Training runs: arguments, the loop, processes, and the run's folder."""
