"""A feature network of one matrix a kind, for tests of what goes through any network."""

import numpy as np

from diffjax.evaluation import networks

KINDS = {"tiny": 5}
OF_INCEPTION = {"pool3": 5, "spatial": 4, "logits": 3}


def projected(params, images):
    """Features of pixels from 0 to 1."""
    rows = images.reshape(len(images), -1) / 255.0
    return {kind: rows @ matrix for kind, matrix in params.items()}


def network(kinds=None, values=8 * 8 * 3, **fields):
    """A network of images of so many values; fields: of Network, in place of those of a network `tiny`."""
    kinds = kinds or KINDS
    rng = np.random.default_rng(0)
    params = {kind: rng.normal(size=(values, width)).astype(np.float32) for kind, width in kinds.items()}
    named = {"name": "tiny", "features": "a projection", "features_sha256": "abc", "resize": "none", "title": "tiny"}
    given = {"kinds": kinds, "moments": tuple(kinds), "suffix": "tiny", "run": projected, "params": params}
    return networks.Network(**{**named, **given, **fields})


def inception(published=True):
    """Stands in for Inception, of the published weights or of others."""
    names = networks.OF_INCEPTION if published else {}
    given = {"name": "inception", "moments": ("pool3", "spatial"), "suffix": "" if published else "inception"}
    return network(OF_INCEPTION, names=names, **given)
