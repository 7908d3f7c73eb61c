"""Training recipes: DreamBooth, instruction fine-tuning and the demo."""
