"""Diffusion processes, samplers and guidance."""
