"""Baseline methods that PEFT does not include."""
