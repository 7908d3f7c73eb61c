"""Training runs: from a configuration to the folder of a run, on one process or several."""
