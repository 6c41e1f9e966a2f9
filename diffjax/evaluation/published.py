"""Published scores with the protocols that they were made by, to set results beside.

Sources: the papers and repositories of ADM (openai/guided-diffusion), DiT (2212.09748), U-DiT (2405.02730), DiS
(2402.05608) and DiffiT (2312.02139). A field that a source does not state is left out, and then is neither the same nor
different.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffjax.evaluation.networks import PYTORCH_FID, RULES, TENSORFLOW
from diffjax.trees import leaves

INCEPTION = {"features": "Inception-v3 of 2015-12-05", "num": 50_000}
OF_DIS = {**INCEPTION, "resize": RULES["inception"][PYTORCH_FID]}


def _adm(size: int) -> dict[str, Any]:
    """The protocol of the ADM suite."""
    name = "VIRTUAL_imagenet512.npz" if size == 512 else f"VIRTUAL_imagenet{size}_labeled.npz"
    return {**INCEPTION, "resize": RULES["inception"][TENSORFLOW], "reference.name": name}


def _ddpm(scale: float) -> dict[str, Any]:
    return {"sampling.sampler": "ddpm", "sampling.steps": 250, "sampling.guidance.scale": scale}


@dataclass(frozen=True)
class Published:
    """A row of the table: of which model, images of which side, its scores, and what of their protocol is known."""

    name: str
    size: int
    values: Mapping[str, float]
    protocol: Mapping[str, Any]

    def differing(self, protocol: Mapping[str, Any]) -> list[str]:
        """The fields in which the protocol of a result differs from that of this row."""
        stated = leaves(protocol)
        return [field for field, value in self.protocol.items() if stated.get(field) != value]


def _row(name: str, size: int, scores: tuple[float | None, ...], protocol: Mapping[str, Any]) -> Published:
    """scores: FID, sFID, Inception score, precision, recall; None where the source has none."""
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    return Published(name, size, {n: value for n, value in zip(names, scores) if value is not None}, protocol)


ROWS = (
    _row("ADM-G, upsampled", 256, (3.94, 6.14, 215.84, 0.83, 0.53), _adm(256)),
    _row("DiT-XL/2, 7M steps", 256, (9.62, 6.85, 121.50, 0.67, 0.67), _adm(256) | _ddpm(1.0)),
    _row("DiT-XL/2, cfg 1.25", 256, (3.22, 5.28, 201.77, 0.76, 0.62), _adm(256) | _ddpm(1.25)),
    _row("DiT-XL/2, cfg 1.5", 256, (2.27, 4.60, 278.24, 0.83, 0.57), _adm(256) | _ddpm(1.5)),
    _row("DiT-XL/2, 400K steps", 256, (19.47, None, None, None, None), _adm(256) | _ddpm(1.0)),
    _row("DiT-B/2, 400K steps", 256, (43.47, None, None, None, None), _adm(256) | _ddpm(1.0)),
    _row("U-DiT-S, 400K steps", 256, (31.51, 8.97, 51.62, 0.543, 0.633), _adm(256) | _ddpm(1.0)),
    _row("U-DiT-B, 400K steps", 256, (16.64, 6.33, 85.15, 0.642, 0.639), _adm(256) | _ddpm(1.0)),
    _row("U-DiT-L, 400K steps", 256, (10.08, 5.21, 112.44, 0.702, 0.631), _adm(256) | _ddpm(1.0)),
    _row("U-DiT-L, 1M steps", 256, (7.54, 5.27, 135.49, 0.706, 0.659), _adm(256) | _ddpm(1.0)),
    _row("DiffiT-XL/2", 256, (1.73, 4.54, 276.49, 0.8024, 0.6205), INCEPTION),
    _row("DiS-H/2", 256, (2.10, None, None, None, None), OF_DIS),
    _row("DiT-XL/2, 3M steps", 512, (12.03, 7.12, 105.25, 0.75, 0.64), _adm(512) | _ddpm(1.0)),
    _row("DiT-XL/2, cfg 1.5", 512, (3.04, 5.02, 240.82, 0.84, 0.54), _adm(512) | _ddpm(1.5)),
    _row("DiffiT-XL/2", 512, (2.67, 4.99, 252.13, 0.8277, 0.5500), INCEPTION),
    _row("DiS-H/2", 512, (2.88, None, 272.33, None, None), OF_DIS),
)
