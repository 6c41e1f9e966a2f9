"""Pallas kernels, one file per operation and kind of device; each has a plain twin in `diffjax.ops`."""
