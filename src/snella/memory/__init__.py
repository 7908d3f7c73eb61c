"""Less activation memory and cheaper gradients: recomputed inputs, int8 compression and token sampling."""
