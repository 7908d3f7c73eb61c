"""Activation memory: recomputed inputs, int8 compression and token sampling."""
