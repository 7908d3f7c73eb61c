"""Less activation memory: recomputed inputs and int8 compression."""
