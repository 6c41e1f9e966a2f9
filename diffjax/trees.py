"""Names for the leaves of nested dicts, and what differs between two of them."""

import json
from collections.abc import Mapping
from typing import Any


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    named: dict[str, Any] = {}
    for key, value in tree.items():
        named.update(leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return named


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The leaves of two json-able trees that differ, each in words: 'labels ("2", now "1")'."""
    old, new = leaves(stored), leaves(json.loads(json.dumps(wanted)))
    pairs = {name: (_said(old, name), _said(new, name)) for name in sorted(old | new) if old.get(name) != new.get(name)}
    return [f"{name} ({before}, now {now})" for name, (before, now) in pairs.items()]


def _said(values: Mapping[str, Any], name: str) -> str:
    """The value of a leaf as json, "not given" without one."""
    return json.dumps(values[name])[:60] if name in values else "not given"
