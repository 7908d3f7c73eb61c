"""Step time and memory benchmarks against baselines, written as JSON lines."""
