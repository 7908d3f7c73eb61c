"""Benchmarks of step time and memory against baselines, written as JSON lines."""
