"""Instruction fine-tuning of causal language models and evaluation on the commonsense benchmark."""
