"""Array operations that the models share, each a pure function."""

from diffjax.ops.selective_scan import selective_scan

__all__ = ["selective_scan"]
