"""Training runs: from a configuration to a run folder, in one process or several."""
