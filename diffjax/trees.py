"""Names for the leaves of nested dicts."""

from collections.abc import Mapping
from typing import Any


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    named: dict[str, Any] = {}
    for key, value in tree.items():
        named.update(leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return named
