"""Step time and memory benchmarks against baselines, written as JSON lines."""

from snella_lab.bench.baselines import BASELINES
from snella_lab.bench.bench import BenchConfig, bench, grid, measure_competition, measure_matrix, measure_sampling

__all__ = ["BASELINES", "BenchConfig", "bench", "grid", "measure_competition", "measure_matrix", "measure_sampling"]
