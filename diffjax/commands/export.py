"""Write parameters in the layout of the public checkpoint of a family, so that other programs read them: OUT.

python -m diffjax export --workdir=runs/a --family=dit --out=dit.safetensors
python -m diffjax export --params=params/dit-xl --family=dit --out=dit.safetensors
python -m diffjax export --workdir=runs/vae --family=vae --out=params/vae

It takes the averaged parameters of a run; --weights=params the last ones. An autoencoder also goes into a folder of
diffusers, whose config.json has its sizes and scale. `convert` reads both back.
"""

import jax
from absl import flags
from safetensors.numpy import save_file

from diffjax import models
from diffjax.commands import define_overwrite, define_path, make_folder
from diffjax.errors import UserError
from diffjax.files import atomic, file_sha256, write_json
from diffjax.parallel import hosts
from diffjax.runs import open_run
from diffjax.weights import (
    FAMILIES,
    MODELS,
    autoencoders,
    checkpoints,
    is_sized,
    reference_config,
    store,
    to_reference,
)

REQUIRED = ("family", "out")


def define_flags(values: flags.FlagValues) -> None:
    define_path("workdir", None, "run folder", values)
    define_path("params", None, "folder that `convert` or `ema` wrote, instead of --workdir", values)
    flags.DEFINE_integer("step", None, "of --workdir: which checkpoint; the latest by default", flag_values=values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "of --workdir: average or last ones", flag_values=values)
    flags.DEFINE_string("family", None, f"whose layout: {', '.join(FAMILIES)}", flag_values=values)
    side = "side of the inputs, where --params does not say it, for families with a table of positions"
    flags.DEFINE_integer("size", None, side, lower_bound=1, flag_values=values)
    define_path("out", None, "file, .safetensors; of vae and tiny_vae also a folder", values)
    define_overwrite(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start("off")
    out = values.out
    if bool(values.workdir) == bool(values.params):
        raise UserError("export: give either --workdir or --params")
    if values.params and (values["step"].present or values["weights"].present):
        raise UserError("export: --step and --weights choose within a run folder; they have no effect on --params")
    check_family(values.family)
    in_folder = MODELS[values.family] in autoencoders.KINDS and out.suffix != ".safetensors"
    file = out / checkpoints.FOLDER[0] if in_folder else out
    if file.suffix != ".safetensors" or file.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .safetensors")
    if file.exists() and not values.overwrite:
        raise UserError(f"{file} is there already; choose another --out, or --overwrite replaces it")
    own: int | None
    if values.workdir:
        found = open_run(values.workdir, weights=values.weights, step=values.step)
        module, params, name = found.experiment.model, jax.device_get(found.params), found.describe()
        kind, own = models.family_of(found.experiment.name), found.experiment.size
    else:
        module, params, made = store.load(values.params)
        kind, name, own = made["name"], f"{made['name']} of {values.params}", made.get("size")
    check_model(values.family, kind, name)
    if values.size and own and values.size != own:
        raise UserError(f"--size={values.size}, but {name} is for inputs of side {own}; leave out --size")
    size = values.size or own
    if is_sized(values.family) and not size:
        raise UserError(
            f"export: files of {values.family} hold a table of positions, and {values.params} does not say for which "
            "inputs; give their side, --size=32 for latents of 256 pixels"
        )
    make_folder(file)
    weights = to_reference(values.family, module, params, size or 1)  # of the others none depends on it
    if in_folder:
        file.unlink(missing_ok=True)  # never old weights beside a new config.json
        write_json(out / "config.json", reference_config(values.family, module))
    with atomic(file) as opened:
        save_file(weights, opened.name, {"format": "pt"})
    count = sum(array.size for array in weights.values())
    print(f"wrote {len(weights)} arrays with {count:,} numbers of {name} to {file}, sha256 {file_sha256(file)}")


def check_family(family: str) -> None:
    if family not in FAMILIES:
        raise UserError(f"--family={family} is unknown; valid: {', '.join(FAMILIES)}")


def check_model(family: str, kind: str, name: str) -> None:
    """UserError unless the model can be written in the layout of a family."""
    if MODELS[family] != kind:
        valid = (
            ", ".join(each for each, model in MODELS.items() if model == kind) or "none, no public checkpoint has it"
        )
        raise UserError(
            f"--family={family} is the layout of {MODELS[family]}, and {name} holds a {kind}; valid: {valid}"
        )
