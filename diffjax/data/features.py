"""Make a folder of latents of the feature folders that others published, in the layouts of the table below.

The same call resumes an interrupted conversion of the same files; the manifest is written last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import layouts
from diffjax.data.latents import INPUT_RANGE, Numbers, Origin, Spread, write_latents
from diffjax.data.layouts import Features
from diffjax.errors import UserError

SAMPLED = 1024  # examples, evenly spaced, that are looked at before anything is written
SD_SCALE = 0.18215  # of the autoencoder of Stable Diffusion
EDM2_MEAN, EDM2_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # that EDM2 assumes, by channel


@dataclass(frozen=True)
class Layout:
    """What a release means by its numbers.

    Attributes:
        read: a reader of layouts.py.
        scale, shift: models train on (z - shift) scale; where the release has its own statistics, on scale times what
            they normalise.
        scale_applied: whether the numbers are scaled already.
        std: standard deviation of what models train on, where everything is right.
        autoencoder: as far as the release says it.
        input_range: of the pixels that it was given.
    """

    read: Callable[[Path], Features]
    scale: Numbers
    autoencoder: str
    shift: Numbers = 0.0
    scale_applied: bool = False
    std: float = 1.0
    input_range: tuple[float, float] = INPUT_RANGE


LAYOUTS: dict[str, Layout] = {
    "fast-dit": Layout(layouts.fast_dit, SD_SCALE, "not recorded; sd-vae-ft-ema or -mse", scale_applied=True),
    "udit": Layout(layouts.udit, SD_SCALE, "not recorded; the program's default is sd-vae-ft-ema", scale_applied=True),
    "u-vit": Layout(layouts.u_vit, SD_SCALE, "autoencoder_kl of Stable Diffusion"),
    "edm2": Layout(
        layouts.edm2,
        scale=tuple(0.5 / std for std in EDM2_STD),
        shift=EDM2_MEAN,
        std=0.5,
        autoencoder="sd-vae-ft-mse",
        input_range=(0.0, 1.0),
    ),
    "va-vae": Layout(layouts.va_vae, 1.0, "vavae-imagenet256-f16d32-dinov2"),
}


def convert(layout: str, source: Path, out: Path, num_classes: int) -> dict[str, Any]:
    """Write the latents of a published feature folder to the folder `out`; returns the manifest.

    Args:
        layout: one of LAYOUTS.
        source: the folder or file of the release.
        num_classes: 0: labels are left out.

    Raises:
        UserError: what differs from the layout, and numbers that seem to be scaled twice or never.
    """
    if layout not in LAYOUTS:
        raise UserError(f"{layout!r} is no layout of features; valid: {', '.join(LAYOUTS)}")
    known = LAYOUTS[layout]
    found = known.read(source)
    if num_classes and not found.labelled:
        raise UserError(f"{source} has no labels; valid: num_classes = 0")
    scale, shift = known.scale, known.shift
    if found.statistics:
        mean, std = found.statistics
        scale, shift = tuple((np.asarray(scale) / std).tolist()), tuple(mean.tolist())
    origin = Origin(
        source=f"{layout} features {source.name}",
        autoencoder=known.autoencoder,
        weights_sha256="",
        input_range=known.input_range,
        scale=scale,
        shift=shift,
        scale_applied=known.scale_applied,
        num_classes=num_classes,
        label_table_sha256="",
        fingerprint=found.fingerprint,
    )
    check_spread(source, found, origin, known.std)
    return write_latents(out, found if num_classes else Unlabelled(found), origin)


def check_spread(source: Path, found: Features, origin: Origin, expected: float) -> None:
    """Raise UserError for latents whose scaled standard deviation is not within a factor of two of what is expected.

    Scaling by 0.18215 twice or never puts it off by 5.5, dividing by EDM2's deviations by 3.3 or more, while data sets
    differ from ImageNet by tens of percent. A mean beyond one deviation tells pixels of another range: the means that
    EDM2 subtracts are up to 1.4 of its deviations, and are those of pixels in [0, 1] alone.
    """
    spread = Spread()
    for index in np.unique(np.linspace(0, len(found) - 1, min(SAMPLED, len(found))).astype(int)):
        spread.add(found[int(index)][0])
    mean, std = spread.of(origin)
    total = float(np.sqrt(np.mean(std**2)))
    if not expected / 2 < total < expected * 2:
        raise UserError(
            f"{source}: the scaled latents have standard deviation {total:.3g} where {expected} is expected; scale "
            f"applied twice or never? (scale {origin.scale}, applied already: {origin.scale_applied})"
        )
    if (np.abs(mean) > expected).any():
        raise UserError(
            f"{source}: the scaled latents have means {np.round(mean, 2).tolist()} and standard deviation {total:.3g}; "
            f"valid: means within {expected}; an autoencoder of pixels in {list(origin.input_range)}?"
        )


@dataclass(frozen=True)
class Unlabelled(Sequence[layouts.Example]):
    """Features with label 0 for all."""

    features: Features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        return self.features[index][0], 0


def leaves(manifest: dict[str, Any]) -> str:
    """The arguments of `train` that say how latents are scaled."""
    values = {leaf: manifest[leaf] for leaf in ("scale", "shift", "input_range")}
    texts = {leaf: ",".join(map(str, np.ravel(value).tolist())) for leaf, value in values.items()}
    return " ".join(f"--config.data.{leaf}={text}" for leaf, text in texts.items())
