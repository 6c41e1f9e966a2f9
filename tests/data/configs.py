"""The data sets that the tests of this folder open."""

from typing import Any

Section = dict[str, Any]  # the arguments of `sources.load`


def section(name: str, size: int, channels: int, num_classes: int, **leaves: Any) -> Section:
    """What every source needs, and `leaves`: more of it, and options of the source."""
    return {"name": name, "size": size, "channels": channels, "num_classes": num_classes} | leaves


def digits(**leaves: Any) -> Section:
    return section("digits", **({"size": 8, "channels": 1, "num_classes": 10} | leaves))


def emoji32(**leaves: Any) -> Section:
    return section("emoji32", 32, 3, 9, **leaves)
