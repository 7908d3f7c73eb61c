"""Method comparisons on identical images, epochs and batches: tuned on validation, evaluated once on test."""
