"""What the TPU compiler makes of a training step of U-DiT on several chips: weights are gathered, feature maps not."""

import math
import re

import pytest

from diffjax import models
from diffjax.config import load
from tests.benchmarks.tpu_train_step import compiled_step
from tests.programs import ROOT

pytestmark = pytest.mark.slow
BATCH = 68  # on four chips in parts of 17 or 34, and no other axis is a multiple of 17
DEPTHS = {"depth": (1, 1, 1, 1, 1)}  # one block of each stage
WIDEST = 4 * 96  # channels of the latent stage


def test_no_feature_map_is_gathered_or_permuted():
    """Seen before the depthwise kernels were constrained: all of [b, 8, 8, 768] gathered in the latent stage.

    Vectors per example, the largest being the modulation with six per channel, may be. Sums of feature maps over
    `tensor` are what that axis is for.
    """
    mesh = ("parallel.mesh.fsdp=2", "parallel.mesh.tensor=2", "parallel.strategy=fsdp_tp")
    sizes = [f"model.{name}={value}" for name, value in (models.published_sizes("U-DiT-S") | DEPTHS).items()]
    overrides = (f"batch_size={BATCH}", "parallel.replicate_below=0", *mesh, "model.name=U-DiT", *sizes)
    config = load(f"{ROOT}/configs/udit_imagenet.py:model=u-dit-s", [f"--config.{o}" for o in overrides])
    program = compiled_step(config).as_text()
    assert len(re.findall(r" (?:all-gather|all-reduce)(?:-start)?\(", program)) > 10  # of weights and gradients
    moved = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    shapes = [[int(n) for n in dims.split(",")] for text in moved for dims in re.findall(r"\[([\d,]+)\]", text)]
    of_batch = [shape for shape in shapes if any(n and n % 17 == 0 for n in shape)]
    assert [shape for shape in of_batch if math.prod(shape) > BATCH * 6 * WIDEST] == []
