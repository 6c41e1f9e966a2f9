"""Draw images and write them as npz (ADM layout), json (the protocol) and png (a grid).

python -m diffjax sample --workdir=runs/a --num=50000 --out=runs/a/samples.npz
python -m diffjax sample --workdir=runs/a --labels=2 --num=16 --out=twos.npz
python -m diffjax sample --params=params/dit-xl --config=configs/imagenet256.py --raw --num=8 --out=latents.npz
python -m diffjax sample --checkpoint=DiT-XL-2-256x256.pt --family=dit --autoencoder=sd-vae-ft-ema --labels=207,360 \\
  --num=8 --out=samples.npz
python -m diffjax sample --workdir=runs/stage1 --num=500 --raw --out=tokens.npz
python -m diffjax sample --workdir=runs/stage2 --source=tokens.npz --num=500 --out=samples.npz
python -m diffjax sample --workdir=runs/a --guide=runs/small --config.sampling.guidance.scale=2 --num=500 --out=a.npz

Image i depends on (seed, i), its condition and the parameters alone: not on the batch size or the number of devices.
They are written in parts as they are made: the same command after an interruption goes on, and ends with the same file.
A finished file is left as it is; one of another request is replaced with --overwrite alone.
With --guide the images are pushed away from those of a worse network (autoguidance, arXiv 2406.02507), given the same
conditions, with `sampling.guidance.scale` as the weight; there is no classifier-free guidance then.
"""

from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from diffjax import models
from diffjax.commands import (
    define_distributed,
    define_overwrite,
    define_path,
    make_folder,
    refuse_other,
)
from diffjax.commands.trained import define_trained, open_trained
from diffjax.contracts import Tree
from diffjax.errors import UserError
from diffjax.evaluation import protocol
from diffjax.experiment import Experiment
from diffjax.files import read_protocol
from diffjax.parallel import hosts
from diffjax.runs import Run, open_guide
from diffjax.sampling import conditions, generate, parts, samples

INTERRUPTED = "what is drawn is kept, the same command resumes"
NO_DECODER = (
    "give their autoencoder to decode them (--autoencoder=PATH, or the name of one that `python -m diffjax fetch "
    "sd-vae-ft-ema` brings), or --raw to write them as they are"
)
REQUIRED = ("num", "out")


def define_flags(values: flags.FlagValues) -> None:
    number = flags.DEFINE_integer
    define_trained(values)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "average or last parameters", flag_values=values)
    number("num", None, "how many images", lower_bound=1, flag_values=values)
    number("first", 0, "number of the first image", lower_bound=0, flag_values=values)
    number("seed", 0, "seed of the images", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    number("batch_size", 128, "images at a time on all devices", lower_bound=1, flag_values=values)
    labels = "interleaved: classes in equal parts; uniform: drawn; or some of them in turn, by number or name: 207,360"
    flags.DEFINE_string("labels", "interleaved", labels, flag_values=values)
    flags.DEFINE_bool(
        "raw",
        False,
        "write what the model makes as it is (arr_0): float32 values, or tokens",
        flag_values=values,
    )
    flags.DEFINE_bool("fused", True, "sample the fused form of a backbone that has one (U-DiT)", flag_values=values)
    define_path("guide", None, "worse network: a run folder, or one written by `convert` or `ema`", values)
    define_path("source", None, "stage-2 models: source tokens, .npz that --raw of stage 1 wrote", values)
    define_path("conditions", None, ".npz with an array `conditions`, of a model of vectors or tokens", values)
    define_path("out", None, "samples file, .npz", values)
    define_overwrite(values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    out = values.out
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .npz")
    average = values.weights if values["weights"].present else None
    trained = open_trained("sample", values, overrides, average)
    experiment = trained.experiment
    if not experiment.method.sampler:
        _ = experiment.sampler  # says why there is none
    if experiment.method.makes != "pictures" and not values.raw:
        raise UserError(f"sample: this model makes {experiment.method.makes}, not pictures; {NO_DECODER}")
    guide = open_guide(values.guide, experiment) if values.guide else None
    sampler = experiment.make_sampler(autoguided=True) if guide else experiment.sampler
    asked = _conditions(values, trained)
    make_folder(out)
    form = describe_form(experiment.model, trained.params, values.fused)
    settings = {
        "labels": values.labels,
        "seed": values.seed,
        "first": values.first,
        "num": values.num,
        **asked.described,
    }
    guided = {"guide": guide.origin} if guide else {}
    settings |= {"raw": True} if values.raw else experiment.decoder_protocol()
    described = describe(experiment, trained.origin, form, **guided, **settings)
    if not values.overwrite and is_finished(out, described):
        hosts.say(f"{out} is finished: {values.num} of {trained.describe()}; --overwrite draws them again")
        return
    compiled = generate.compile_sampler(
        sampler,
        experiment.model,
        experiment.mesh,
        values.seed,
        decode=None if values.raw else experiment.decode,
        fused=values.fused,
        guide=(guide.experiment.model, guide.params) if guide else None,
    )
    if trained.caveat:
        hosts.say(trained.caveat)
    hosts.say("compiling the sampler (once); the first images wait for it")
    write(out, trained, compiled, asked, described, values.batch_size, values.raw)
    if hosts.is_lead():
        pictures = experiment.method.makes == "pictures" and not values.raw
        made = "images" if pictures else "raw results"
        grid = f", a grid of them to {out.with_suffix('.png')}" if pictures else ""
        print(f"wrote {values.num} {made} of {trained.describe()}, {form}, to {out}{grid}")


def is_finished(out: Path, described: dict[str, Any]) -> bool:
    """Whether the samples file `out` is there, made as described. UserError where something else is in its place."""
    beside, under_way = out.with_suffix(".json"), parts.folder_of(out).exists()
    if not out.exists():
        if beside.exists() and '"samples_sha256"' not in beside.read_text():  # a result: it would be replaced
            refuse_other(beside, None, described)
        return False
    try:
        stored = read_protocol(out)
    except UserError:
        stored = {}
    if under_way and not stored:  # whoever was about to finish the file was stopped
        return False
    refuse_other(out, stored, described)
    return not under_way


def write(
    out: Path,
    trained: Run,
    compiled: Any,
    asked: conditions.Conditions,
    described: dict[str, Any],
    batch_size: int,
    raw: bool,
) -> None:
    """Draw what no part of the file holds yet, each process its own images, and put the parts together."""
    identity = identity_of(described, asked, raw)
    num = len(asked.given)
    with parts.opened(out, identity, num) as (file, missing):
        with tqdm(total=num, initial=num - len(missing), unit="image", disable=quiet()) as bar:
            first, shape = described["first"], min(batch_size, num)  # the same, however many are missing
            drawn = generate.generate(
                compiled, trained.params, asked.given[missing], first + missing, trained.experiment.mesh, shape
            )
            for numbers, rows in drawn:
                samples.check_finite(rows, numbers)
                file.write(numbers - first, rows if raw else samples.to_uint8(rows))
                bar.update(len(numbers))
        hosts.wait(f"parts of {out}")
        if hosts.is_lead():
            file.finish(asked.arrays, described, raw=raw, classes=asked.classes)


def identity_of(described: dict[str, Any], asked: conditions.Conditions, raw: bool = False) -> dict[str, Any]:
    """What row i of a folder of parts is, of the description of samples; that of any number of them."""
    aside = ("num", "code_version", "origin", "classes")
    what = {name: value for name, value in described.items() if name not in aside}
    return {
        **what,
        "weights_sha256": described["origin"]["sha256"],
        "raw": raw,
        "conditions_sha256": asked.sha256,
    }


def quiet() -> bool | None:
    """No bar on the processes that stay silent, nor where nobody watches."""
    return None if hosts.is_lead() else True


def _conditions(values: flags.FlagValues, trained: Run) -> conditions.Conditions:
    """The condition of each image, from the flags."""
    experiment = trained.experiment
    kind = experiment.method.condition.kind if experiment.method.condition else "labels"
    if values.source and not experiment.method.takes_source:
        raise UserError(
            f"--source={values.source}: only for stage-2 models, which draw decoder tokens given feature tokens"
        )
    if values.conditions and kind == "labels":
        raise UserError(f"--conditions={values.conditions}: this model has labels; valid: --labels")
    if kind != "labels" and values["labels"].present:
        given = "the labels are those of --source" if experiment.method.takes_source else f"this model has {kind}"
        raise UserError(f"sample: {given}; leave out --labels")
    if values.source or experiment.method.takes_source:
        if not values.source:
            raise UserError("sample: this stage-2 model is conditioned on feature tokens: give them as --source")
        return conditions.of_source(values.source, values.first, values.num, trained)
    if kind != "labels":
        return conditions.of_file(values.conditions, values.first, values.num, experiment)
    return conditions.of_labels(
        values.labels, values.seed, values.first, values.num, experiment.num_classes, trained.classes
    )


def describe_form(model: Any, params: Tree, fused: bool) -> str:
    """In which form of the backbone the images are drawn, in words."""
    shapes = jax.eval_shape(lambda params: models.fused(model, params)[1], params)
    count, left = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, shapes))
    return f"fused: {left:,} of {count:,} parameters" if fused and left < count else "as trained"


def describe(
    experiment: Experiment, origin: dict[str, Any], form: str, guide: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """The protocol of generated images, json-able. guide: its origin. settings: labels, seed, first, num."""
    made = experiment.description()
    precision, sampling = made.pop("precision"), made.pop("sampling")
    guided = {"guide_sha256": guide["sha256"]} if guide else {}
    return {
        **made,
        "form": form,
        "origin": origin,
        **({"guide": guide} if guide else {}),
        "sampling": sampling | guided,
        **settings,
        "rounding": samples.ROUNDING,
        "precision": precision,
        "code_version": protocol.code_version(),
    }
