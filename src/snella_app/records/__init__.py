"""JSON files of a run as dataclasses."""
