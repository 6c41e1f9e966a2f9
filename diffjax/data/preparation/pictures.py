"""Image files in a folder or an archive, without classes, or with those of their folders or of a dataset.json."""

import json
from pathlib import Path

import numpy as np

from diffjax.data.preparation.containers import Container, open_container
from diffjax.data.preparation.originals import Originals, of_container
from diffjax.errors import UserError

LABELS = "dataset.json"  # as EDM's archives have it: {"labels": [[name, class], ...] or null}


def read(path: Path, split: str) -> Originals:
    """All images in the order of their names, unlabelled: their folders are no classes."""
    container = open_container(path)
    return of_container(container, list(container.sizes))


def read_labelled(path: Path, split: str) -> Originals:
    """All images in the order of their names; of the classes that dataset.json, or else the top-level folders, give."""
    container = open_container(path)
    return of_container(container, list(container.sizes), *labels_of(container, path))


def labels_of(container: Container, path: Path) -> tuple[np.ndarray | None, list[str]]:
    """Labels int32 [n] of all images in the order of their names, and the names of the classes; (None, []) without."""
    names = list(container.sizes)
    if LABELS in container:
        return _of_json(container, names, path)
    loose = [name for name in names if "/" not in name]
    if loose and len(loose) < len(names):
        raise UserError(f"{path}: image {loose[0]} lies beside class folders; move it into one of them")
    if loose:
        return None, []
    classes = sorted({name.partition("/")[0] for name in names})
    ranks = {name: rank for rank, name in enumerate(classes)}
    return np.array([ranks[name.partition("/")[0]] for name in names], np.int32), classes


def _of_json(container: Container, names: list[str], path: Path) -> tuple[np.ndarray | None, list[str]]:
    """Labels int32 [n] and the names of the classes: their numbers, 0 to the largest."""
    try:
        stored = json.loads(container.read(LABELS))["labels"]
        if stored is None:
            return None, []
        given = dict(stored)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: {LABELS}: valid: {{"labels": [[name, class], ...]}} or {{"labels": null}}') from error
    if wrong := [label for label in given.values() if type(label) is not int or label < 0]:
        raise UserError(f"{path}: {LABELS}: label {json.dumps(wrong[0])[:60]}; valid: integers from 0")
    if given.keys() != set(names):
        strange = min(given.keys() ^ set(names))
        where = "not among the images" if strange in given else "without a label"
        raise UserError(f"{path}: {LABELS}: {strange} is {where}")
    classes = 1 + max(given.values(), default=-1)
    if classes > len(given):
        raise UserError(f"{path}: {LABELS}: class {classes - 1} of {len(given)} images; valid: numbers from 0 on")
    return np.array([given[name] for name in names], np.int32), [str(label) for label in range(classes)]
