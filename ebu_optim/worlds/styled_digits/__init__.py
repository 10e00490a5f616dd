"""Digits in styles: a small Stable Diffusion pipeline that is trained from nothing in 20 minutes,
with judges of what it draws, to measure unlearning in."""
