"""DreamBooth: fine-tuning Stable Diffusion 3 on one subject, image generation and evaluation."""
