"""Recomputed inputs and int8 compression, which reduce activation memory."""
