"""Digits in styles: a small Stable Diffusion pipeline, trained from scratch in 20 minutes, with
judges of its images, to measure unlearning."""
