"""Kernels of the operations, each beside a plain twin in the folder above."""
