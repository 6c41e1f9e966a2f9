"""Kernels for accelerators, each beside its plain twin in diffjax.ops."""
