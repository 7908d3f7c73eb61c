"""DreamBooth: fine-tuning Stable Diffusion 3 on a subject, image generation and evaluation."""
