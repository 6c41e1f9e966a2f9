"""What a config says of its data: the data sets, and the settings of the commands that make latents and tokens.

With experiment.py this is the only module that reads a config.
"""

from typing import Any

from diffjax import contracts, rng
from diffjax.config import Config
from diffjax.contracts import DataSpec
from diffjax.data import sources
from diffjax.data.latents import scaling
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.methods import METHODS
from diffjax.methods.encoders import Preparation, Tokenization
from diffjax.methods.latents import Encoding


def data_spec(config: Config) -> DataSpec:
    data = config.data
    condition = contracts.condition(data.condition, data.num_classes, data.condition_size)
    given = (data.name, data.size, data.channels, condition, data.flip, data.augment, data.options)
    return DataSpec(*given, autoencoder=config.autoencoder)


def load_source(data: Any, **options: Any) -> Source:
    """The data set of a section `data` or `images`, with other values of the source's options."""
    shared = ("size", "channels", "num_classes", "condition", "condition_size", "flip")
    given = {name: getattr(data, name) for name in shared if hasattr(data, name)} | dict(data.options)
    if unknown := [name for name in options if name not in given]:
        raise UserError(f"data source {data.name} has no {unknown[0]} to choose; valid: {', '.join(data.options)}")
    return sources.load(data.name, **{**given, **options})


def preparation(config: Config) -> Preparation:
    """The settings of the encoder that makes the tokens, and of its input images."""
    tokens, images = config.settings, config.images
    return Preparation(
        encoder=str(config.data.options["encoder"]),
        grid=config.data.size,
        image_size=images.size,
        image_crop=str(images.options.get("crop", "none")),
        patch=tokens.patch,
        layer=tokens.layer,
        weights=tokens.weights,
        decoder=tokens.decoder,
    )


def encoding(config: Config) -> Encoding:
    """The `Encoding` of a config. UserError for a config of other data than latents, and without an autoencoder."""
    if config.data.name != "latents":
        raise UserError(f"encode: the config's data are {config.data.name}; give one whose data.name is latents")
    if not config.autoencoder.weights:
        raise UserError("encode: autoencoder.weights is empty; give its weights, --config.autoencoder.weights=PATH")
    data = config.data
    return Encoding(
        images=load_source(config.images),
        autoencoder=config.autoencoder,
        size=data.size,
        channels=data.channels,
        scaling=scaling(data.options),
        num_classes=data.num_classes,
        mirrored=data.flip,
        threads=max(data.threads, 1),
    )


def tokenization(config: Config) -> Tokenization:
    """The `Tokenization` of a config. UserError for a config of another method."""
    if not METHODS[config.method].images:
        raise UserError(f"tokenize: the config is that of {config.model.name}, which has no tokens; give one of DiGIT")
    rng.check_environment()
    tokens = config.settings
    return Tokenization(
        images=load_source(config.images),
        made=preparation(config),
        counts={leaf: int(str(config.data.options[leaf])) for leaf in ("vocabulary", "decoder_vocabulary")},
        mirrored=tokens.mirrored,
        fit_images=tokens.fit_images,
        iterations=tokens.iterations,
        init=tokens.init,
        seed=tokens.seed,
    )
