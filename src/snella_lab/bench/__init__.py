"""Speed and memory of a training step, side by side with the peers, as JSON lines."""

from snella_lab.bench.baselines import BASELINES
from snella_lab.bench.bench import BenchConfig, bench, grid, measure_competition, measure_matrix, measure_sampling

__all__ = ["BASELINES", "BenchConfig", "bench", "grid", "measure_competition", "measure_matrix", "measure_sampling"]
