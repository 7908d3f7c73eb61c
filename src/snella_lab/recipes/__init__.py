"""Recipes: DreamBooth, instruction fine-tuning and the demo."""
