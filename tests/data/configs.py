"""The data sections that the tests of this folder use."""

from typing import Any

from ml_collections import ConfigDict


def section(name: str, size: int, channels: int, num_classes: int, **leaves: Any) -> ConfigDict:
    """A data section with the leaves that every source has, and `leaves`."""
    common = {"split": "train", "flip": False, "workers": 0, "threads": 0}
    return ConfigDict({"name": name, "size": size, "channels": channels, "num_classes": num_classes} | common | leaves)


def digits(**leaves: Any) -> ConfigDict:
    return section("digits", 8, 1, 10, **leaves)


def emoji32(**leaves: Any) -> ConfigDict:
    return section("emoji32", 32, 3, 9, **leaves)
