"""The flags that name trained weights, and the run that they stand for: of `sample` and `evaluate`."""

from absl import flags

from diffjax import weights
from diffjax.commands import arguments, define_arguments, define_path
from diffjax.config import load
from diffjax.errors import UserError
from diffjax.runs import Run, open_checkpoint, open_run
from diffjax.weights import store

PLACES = ("workdir", "params", "checkpoint")  # flags, of which one is given
OF_CHECKPOINT = ("family", "entry", "arguments")
NAMES = (*PLACES, *OF_CHECKPOINT, "config", "step", "autoencoder")


def define_trained(values: flags.FlagValues) -> None:
    text = flags.DEFINE_string
    define_path("workdir", None, "run folder: its config and its checkpoint", values)
    define_path("params", None, "folder that `convert` or `ema` wrote, instead of --workdir", values)
    define_path("checkpoint", None, "public weights of --family, instead of --workdir, as `convert` reads them", values)
    text("family", None, f"of --checkpoint: {', '.join(weights.FAMILIES)}", flag_values=values)
    text(
        "entry", "", "of --checkpoint, a training checkpoint: which weights; its average by default", flag_values=values
    )
    define_arguments(values)
    text("config", None, "recipe, with --params that no run made, or --checkpoint", flag_values=values)
    flags.DEFINE_integer("step", None, "which checkpoint; the latest by default", flag_values=values)
    define_path("autoencoder", None, "weights that decode latents, as autoencoder.weights of the config", values)


def open_trained(command: str, values: flags.FlagValues, overrides: list[str], average: str | None = None) -> Run:
    """The run that the flags name.

    average: "ema" or "params", which weights of a run folder; None: not chosen.

    Raises:
        UserError: not exactly one of PLACES, flags that do not go together, and see `runs.open_run`.
    """
    if sum(bool(values[name].value) for name in PLACES) != 1:
        raise UserError(f"{command}: give one of --workdir, --params and --checkpoint")
    if not values.checkpoint and (unread := [name for name in OF_CHECKPOINT if values[name].present]):
        raise UserError(f"{command}: --{unread[0]} is of --checkpoint")
    if values.autoencoder:
        overrides = [*overrides, f"--config.autoencoder.weights={values.autoencoder}"]
    if values.workdir:
        if values.config:
            raise UserError(
                f"{command}: --workdir has its own config; give only leaves, such as --config.sampling.steps=50"
            )
        return open_run(values.workdir, overrides, weights=average or "ema", step=values.step)
    if values["step"].present or average:
        raise UserError(f"{command}: --step and --weights choose within a run folder; they have no effect on others")
    config = load(values.config) if values.config else None
    if values.params:
        store.read_model(values.params)  # says that a folder holds no parameters
        return open_run(values.params, overrides, config=config)
    if not values.family:
        raise UserError(
            f"{command}: --checkpoint needs --family, whose weights they are: {', '.join(weights.FAMILIES)}"
        )
    found = weights.read(values.family, values.checkpoint, values.entry, **arguments(values.arguments))
    return open_checkpoint(found, overrides, config=config)
