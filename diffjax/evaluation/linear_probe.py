"""Linear probes: the accuracy of linear classifiers of frozen features, of many blocks at once.

    logits = W f + b,   W ~ N(0, 0.01^2), b = 0,   loss = cross-entropy, its mean over the batch
    SGD with momentum 0.9, no weight decay, the learning rate on a cosine from its first value to 0

The probes of several blocks see the same examples in the same order and begin alike, so that each is what it would be
without the others. The settings are those of DiGIT's probe (arXiv 2410.12490).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax import rng
from diffjax.data import draws
from diffjax.errors import UserError
from diffjax.parallel.mesh import BATCH_AXES, replicated

STANDARD_DEVIATION, MOMENTUM = 0.01, 0.9
CHUNK = 2**26  # bytes of features that go to the devices at a time


class Probe(NamedTuple):
    weights: Any  # float32 [blocks, d, classes]
    bias: Any  # float32 [blocks, classes]


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    mesh: Mesh,
    *,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 0.4,
    seed: int = 0,
) -> Probe:
    """Train one probe per block, all together; the same on any mesh, to rounding.

    Args:
        features: float32 [n, blocks, d], on the host.
        labels: integers [n], 0 .. num_classes - 1.
        mesh: its data and fsdp axes split each batch.
        seed: of the first weights and of the order, a new permutation of the examples for every epoch.

    Raises:
        UserError: settings that cannot be; probes that diverged.
    """
    _check(features, labels, num_classes, mesh, steps, batch_size, learning_rate)
    order = _order(seed, len(features), steps * batch_size).reshape(steps, batch_size)
    optimizer = optax.sgd(optax.cosine_decay_schedule(learning_rate, steps), momentum=MOMENTUM)
    blocks, d = features.shape[1:]
    probe = jax.device_put(_initial(seed, blocks, d, num_classes), replicated(mesh))
    state = probe, jax.device_put(optimizer.init(probe), replicated(mesh))
    chunk = max(CHUNK // (batch_size * features[0].nbytes), 1)
    advance = jax.jit(functools.partial(_advance, optimizer), out_shardings=replicated(mesh))
    split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    for first in range(0, steps, chunk):
        rows = order[first : first + chunk]
        state = advance(state, *jax.device_put((features[rows], labels[rows].astype(np.int32)), split))
    probe = jax.device_get(state[0])
    if not all(np.isfinite(leaf).all() for leaf in probe):
        raise UserError(f"linear probes diverged with learning rate {learning_rate}; give a smaller one")
    return probe


def accuracy(probe: Probe, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The fraction of examples whose class each probe finds; features [n, blocks, d], labels [n] -> float64 [blocks]"""
    pairs = zip(features.swapaxes(0, 1), *probe)
    return np.array([np.mean(np.argmax(f @ weights + bias, axis=1) == labels) for f, weights, bias in pairs])


def _check(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    mesh: Mesh,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    if features.ndim != 3 or len(features) != len(labels) or not features.size:
        raise UserError(f"features {features.shape} and labels {labels.shape}; valid: [n, blocks, d] and [n]")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels {labels.min()} to {labels.max()}; valid: 0 to {num_classes - 1}")
    if not np.isfinite(features).all():
        raise UserError("features hold values that are not finite")
    if steps < 1 or not learning_rate > 0:
        raise UserError(f"steps = {steps}, learning rate {learning_rate}; valid: 1 or more, and above 0")
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % shards:
        raise UserError(f"batch size {batch_size} cannot be divided among {shards} devices")


def _order(seed: int, n: int, count: int) -> np.ndarray:
    """The first `count` examples of an endless stream that shows all n in a new order in every epoch; int64."""
    epochs = -(-count // n)
    return np.concatenate([draws.permutation(seed, "probe", epoch, n) for epoch in range(epochs)])[:count]


def _initial(seed: int, blocks: int, d: int, num_classes: int) -> Probe:
    weights = STANDARD_DEVIATION * jax.random.normal(rng.stream(seed, "probe"), (d, num_classes), jnp.float32)
    return Probe(jnp.broadcast_to(weights, (blocks, d, num_classes)), jnp.zeros((blocks, num_classes)))


def _advance(optimizer: optax.GradientTransformation, state: Any, features: jax.Array, labels: jax.Array) -> Any:
    """As many steps as there are batches: state = (probe, optimizer's), features [steps, b, blocks, d], labels
    [steps, b]."""

    def step(state: Any, batch: Any) -> tuple[Any, None]:
        probe, optimizer_state = state
        updates, optimizer_state = optimizer.update(jax.grad(_loss)(probe, *batch), optimizer_state)
        return (optax.apply_updates(probe, updates), optimizer_state), None

    return jax.lax.scan(step, state, (features, labels))[0]


def _loss(probe: Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum over blocks of the mean cross-entropy; features [b, blocks, d], labels [b]."""
    products = jnp.einsum("b l d, l d v -> b l v", features, probe.weights, precision=jax.lax.Precision.HIGHEST)
    losses = optax.softmax_cross_entropy_with_integer_labels(products + probe.bias, labels[:, None])
    return jnp.sum(jnp.mean(losses, axis=0))
