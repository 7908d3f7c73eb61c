"""Reduction of activation memory and gradient cost: recomputed inputs, int8 compression and token sampling."""
