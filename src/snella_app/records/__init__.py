"""JSON files of runs and comparisons as dataclasses."""
