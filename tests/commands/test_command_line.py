"""The command line: every mistake is exit code 2, one line that says what and where, and nothing on the disk."""

import json
import os
from collections import OrderedDict

import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.config import read
from diffjax.sampling.samples import write_samples
from diffjax.weights import to_reference
from tests.programs import ROOT, train_arguments
from tests.weights.test_dit import module_and_params
from tests.weights.torch_writer import Named, pretended, tensor, write_zip

QUICKSTART = f"{ROOT}/configs/quickstart.py:model=dit,runlocal"
TRAIN = ("train", f"--config={QUICKSTART}", "--workdir=new")
IMAGENET = f"--config={ROOT}/configs/imagenet256.py:runlocal"
SWEEP = ("--workdir=run", "--reference=digits", "--out=new.json")
CONVERT = ("convert", "--family=dit", "--out=new", "--arguments=num_heads=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a run of 2 steps, converted parameters, and files that are wrong in their own ways."""
    folder = tmp_path_factory.mktemp("world")
    assert main(train_arguments(folder / "run", "total_steps=2")) == 0
    module, params = module_and_params()
    weights = to_reference("dit", module, params)

    def write(name, weights):
        write_zip(folder / name, OrderedDict((k, tensor(v, str(i))) for i, (k, v) in enumerate(weights.items())))

    write("good.pt", weights)
    write("missing.pt", {key: value for key, value in weights.items() if key != "x_embedder.proj.bias"})
    write("unexpected.pt", weights | {"extra.weight": np.zeros(3, np.float32)})
    with pretended(nt=["system"]):
        write_zip(folder / "evil.pt", {"model": Named("nt", "system", ("true",))})
    assert (
        main([*CONVERT[:2], "--arguments=num_heads=2", f"--checkpoint={folder}/good.pt", f"--out={folder}/params"]) == 0
    )
    (folder / "text").write_text("not what it should be")
    (folder / "text.npz").write_text("not what it should be")
    (folder / "text.json").write_text("not what it should be")
    (folder / "broken.py").write_text("def get_config(arg=None):\n    return 1 +\n")
    (folder / "empty.py").write_text("")
    (folder / "folder").mkdir()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    write_samples(folder / "fine.npz", images, np.arange(4), {})
    write_samples(folder / "altered.npz", images, np.arange(4), {})
    np.savez(folder / "altered.npz", arr_0=images + 1, arr_1=np.arange(4))
    np.savez(folder / "other.npz", images=images)
    return folder


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def changed(*overrides):
    return (*TRAIN, *(f"--config.{override}" for override in overrides))


def again(*overrides):
    """The command of the run in `world`, with other leaves."""
    quiet = ("evals.samples.every_steps=0", "log.tensorboard=false")
    return ("train", f"--config={QUICKSTART}", "--workdir=run", *(f"--config.{o}" for o in (*quiet, *overrides)))


MISTAKES = {
    # commands and flags
    "flag-of-a-leaf": ((*TRAIN, "--optim.lr=3"), "no flag --optim.lr; did you mean --config.optim.lr?"),
    "last-name-of-a-leaf": ((*TRAIN, "--learning_rate=3"), "no flag --learning_rate; did you mean --config.optim.lr?"),
    "near-flag": (("train", f"--config={QUICKSTART}", "--work-dir=new"), "no flag --work-dir; did you mean --workdir?"),
    "near-command": (("smaple",), "did you mean sample?"),
    "unknown-command": (("trian",), "command 'trian' is unknown; valid: train, sample"),
    "unknown-flag": ((*TRAIN, "--steps=3"), "train: no flag --steps; did you mean"),
    "no-config": (("train", "--workdir=new"), "train: new holds no run to resume; --config says what to train"),
    "no-workdir": (("train", f"--config={QUICKSTART}"), "train: --workdir is missing; see `python -m diffjax train --"),
    "no-flags": (("sample", "--workdir=run"), "sample: --num and --out are missing; see `python -m diffjax sample --h"),
    "flag-of-wrong-type": (("sample", "--workdir=run", "--num=many", "--out=new.npz"), "--num=many"),
    "flag-out-of-range": (("sample", "--workdir=run", "--num=0", "--out=new.npz"), "--num=0"),
    "word-without-flag": ((*TRAIN, "seed"), "'seed' is not a flag; write --name=value"),
    "overrides-without-config": (("inspect", "--workdir=run", "--config.seed=1"), "inspect takes no --config"),
    "distributed": ((*TRAIN, "--distributed=maybe"), "--distributed=maybe"),
    # configs
    "no-such-config": (("train", f"--config={ROOT}/configs/nothing.py", "--workdir=new"), "quickstart"),
    "config-in-a-bucket": (("train", "--config=gs://b/c.py", "--workdir=new"), "--config=gs://b/c.py: only local"),
    "no-config-file": (("train", "--config=", "--workdir=new"), "--config=: valid: a path"),
    "config-is-no-file": (("train", "--config=folder", "--workdir=new"), "--config=folder: no such file"),
    "config-without-function": (("train", "--config=empty.py", "--workdir=new"), "defines no get_config"),
    "config-with-bad-syntax": (("train", "--config=broken.py", "--workdir=new"), "--config=broken.py: line 2: invalid"),
    "config-is-not-python": (("train", "--config=text", "--workdir=new"), "--config=text: not a Python file"),
    "config-argument": (
        ("train", f"--config={ROOT}/configs/quickstart.py:size=3", "--workdir=new"),
        "config argument 'size' is unknown; valid: model, process, runlocal",
    ),
    "config-argument-of-wrong-type": (
        ("train", f"--config={ROOT}/configs/quickstart.py:runlocal=perhaps", "--workdir=new"),
        "config argument runlocal='perhaps'",
    ),
    "process-of-recipe": (
        ("train", f"--config={ROOT}/configs/quickstart.py:process=flow", "--workdir=new"),
        "process='flow' is unknown; valid: gaussian, edm, flow_linear",
    ),
    "model-of-recipe": (
        ("train", f"--config={ROOT}/configs/quickstart.py:model=unet", "--workdir=new"),
        "model='unet' is unknown; valid: dit",
    ),
    "words-for-initials": (changed("optim.learning_rate=1e-4"), "'optim.learning_rate'; did you mean optim.lr?"),
    "leaves-of-a-section": (
        changed("init.source=a"),
        "no leaf 'init.source'; leaves of init: from, new",
    ),
    "unknown-leaf": (changed("optim.lrr=1e-4"), "the config has no leaf 'optim.lrr'"),
    "unknown-section": (changed("optimizer.lr=1e-4"), "no leaf 'optimizer.lr'; did you mean optim.lr?"),
    "unread-leaf": (changed("diffusion.edm.sigma_data=0.5", "diffusion.edm.p_mean=1"), "diffusion.edm."),
    "unread-sampler-leaf": (
        changed("sampling.ddpm.spacing=stride"),
        "sampling.ddpm.spacing = 'stride' is not read with sampling.sampler = ddim, only with ddpm",
    ),
    "unread-source-leaf": (changed("data.dir=x"), "data.dir = 'x' is not read with data.name = digits, only with"),
    "unread-method-leaf": (changed("tokens.patch=2"), "tokens.patch = 2 is not read with method = diffusion"),
    "unread-optimizer-leaf": (changed("optim.name=adafactor", "optim.b1=0.5"), "optim.b1 = 0.5 is not read"),
    "no-near-leaf": (changed("wobble=1"), "no leaf 'wobble'; sections: autoencoder, checkpoint, data, diffusion"),
    "unknown-leaf-no": (changed("nose=1"), "the config has no leaf 'nose'"),
    "leaf-with-space": ((*TRAIN, "--config.seed", "3"), "'3' is not a flag; write --name=value"),
    "leaf-without-value": ((*TRAIN, "--config.seed"), "--config.seed: write --config.seed=VALUE"),
    "section-as-leaf": (changed("optim=3"), "'optim' is a section; its leaves: name, lr, b1, b2"),
    "switch-off-unknown": ((*TRAIN, "--noconfig.x"), "the config has no leaf 'x'"),
    "switch-off-a-number": ((*TRAIN, "--noconfig.seed"), "--config.seed: write --config.seed=VALUE"),
    "text-for-integer": (changed("total_steps=many"), "total_steps"),
    "fraction-for-integer": (changed("total_steps=1.5"), "total_steps"),
    "text-for-number": (changed("optim.lr=fast"), "optim.lr"),
    "text-for-switch": (changed("data.flip=perhaps"), "data.flip"),
    # contradictions, found before anything is compiled
    "bucket": ((*TRAIN[:2], "--workdir=gs://bucket/run"), "--workdir=gs://bucket/run: only local"),
    "pattern-in-workdir": ((*TRAIN[:2], "--workdir=new[lr=4]"), "new[lr=4]: arrays cannot be kept below a name with"),
    "home-of-nobody": ((*TRAIN[:2], "--workdir=~no-such-user/run"), "Could not determine home directory"),
    "empty-path": ((*TRAIN[:2], "--workdir="), "flag --workdir=: valid: a path"),
    "place-in-a-bucket": (changed("init.from=gs://b/a"), "init.from = 'gs://b/a': only local"),
    "samples-in-a-bucket": (
        ("evaluate", "--samples=gs://b/s.npz", "--reference=digits"),
        "--samples=gs://b/s.npz: only",
    ),
    "scores-into-a-bucket": (
        ("evaluate", "--workdir=run", "--reference=digits", "--out=gs://b/s.json"),
        "--out=gs://b/s.json: only local",
    ),
    "compare-in-a-bucket": (("evaluate", "--compare=gs://b/a.json,b.json"), "gs://b/a.json,b.json: only local"),
    "reference-in-a-bucket": (
        ("evaluate", "--samples=fine.npz", "--reference=gs://b/r.npz"),
        "--reference=gs://b/r.npz: only local",
    ),
    "sweep-of-a-bucket": (
        ("sweep", "--workdir=run,gs://b/a", "--sampler=ddim:2", "--reference=digits", "--out=new.json"),
        "gs://b/a: only local",
    ),
    "tokens-into-a-bucket": (("tokenize", f"--config={QUICKSTART}", "--out=gs://b/t"), "--out=gs://b/t: only local"),
    "convert-into-a-bucket": (
        ("convert", "--family=dit", "--out=gs://b/p", "--checkpoint=good.pt"),
        "--out=gs://b/p: only local",
    ),
    "convert-into-a-pattern": ((*CONVERT[:2], "--out=new[1]", "--checkpoint=good.pt"), "arrays cannot be kept below"),
    "fixed-leaf": (
        (*again("batch_size=32"), "--accept=batch_size"),
        "batch_size: cannot change",
    ),
    "fewer-steps": ((*again("total_steps=1"), "--accept=total_steps"), "beyond total_steps = 1"),
    "seed": (changed("seed=4294967296"), "seed = 4294967296: valid: 0 to"),
    "momentum": (changed("optim.b1=1.5"), "optim.b1 = 1.5"),
    "pictures": (changed("evals.samples.every_steps=1", "evals.samples.num=-1"), "evals.samples.num = -1"),
    "guided-channels": (changed("sampling.guidance_channels=-3"), "sampling.guidance.channels = -3: valid: 0 or more"),
    "eta": (
        changed("sampling.sampler=ddpm", "sampling.options=eta=0.5"),
        "no leaf 'sampling.ddpm.eta'; did you mean sampling.ddim.eta",
    ),
    "sampling-options": (changed("sampling.options=eta"), "sampling.options: 'eta' is not understood"),
    "diffusion-options": (changed("diffusion.options=shift=3"), "the config has no leaf 'diffusion.gaussian.shift'"),
    "no-steps": (changed("total_steps=0"), "total_steps = 0: valid: 1 or more"),
    "model": (changed("model.name=UNet"), "model 'UNet' is unknown; valid: DiT"),
    "sizes-of-a-published-name": (
        ("train", f"--config={ROOT}/configs/imagenet256.py", "--workdir=new", "--config.model.depth=3"),
        "model.depth = 3, but dit-xl-2 has 28; valid: model.name = 'DiT' with sizes of your own",
    ),
    "fine-tune-from-another-model": (
        changed("init.from=params"),
        "init.from = 'params' holds another model (depth 3 not 2, width 24 not 48, heads 2 not 3); give --config.",
    ),
    "dtype": (changed("model.dtype=float8"), "dtype"),
    "clip-of-latents": (
        changed("data.name=latents"),
        "sampling.clip limits pixels, and data.name = 'latents' has none",
    ),
    "data-set": (changed("data.name=mnist"), "data.name = 'mnist': valid: digits, emoji32, folder"),
    "split": (changed("data.split=dev"), "data.split='dev' is not a split of digits"),
    "size-of-data": (changed("data.size=16"), "data.size=16, but digits has size=8"),
    "classes-of-data": (changed("data.num_classes=7"), "data.num_classes=7, but digits has num_classes=10"),
    "process": (changed("diffusion.process=flow"), "diffusion.process = 'flow': valid: gaussian, edm"),
    "prediction": (changed("diffusion.prediction=velocity"), "valid: epsilon, x0, v"),
    "variance": (changed("diffusion.variance=none"), "valid: learned_range"),
    "loss": (changed("diffusion.loss=l1"), "valid: mse"),
    "label-drop": (changed("diffusion.label_drop=1.5"), "diffusion.label_drop = 1.5"),
    "sampler": (changed("sampling.sampler=heunn"), "sampling.sampler = 'heunn': valid: ddpm, ddim"),
    "sampler-of-process": (changed("sampling.sampler=heun"), "which a discrete process has not; valid: ddpm, ddim"),
    "no-sampling-steps": (changed("sampling.steps=0"), "0 sampling steps: valid: 1 to"),
    "sampling-steps": (changed("sampling.steps=3000"), "3000"),
    "guidance": (
        changed("diffusion.label_drop=0.0"),
        "sampling.guidance.scale needs a null condition: data.num_classes",
    ),
    "schedule": (changed("optim.schedule=step"), "optim.schedule = 'step': valid: constant, cosine"),
    "negative-rate": (changed("optim.lr=-1.0"), "optim.lr = -1.0: valid: 0 or more"),
    "ema": (changed("ema.decay=2.0"), "ema.decay = 2.0: valid: 0 to 1"),
    "ema-kind": (changed("ema.kind=edm"), "ema.kind = 'edm': valid: constant, halflife"),
    "power-emas": (
        changed("ema.sigma_rel=0.05,0.1"),
        "ema.snapshot_every_steps = 0: power-function EMAs need snapshots",
    ),
    "power-ema-text": (
        changed("ema.sigma_rel=long", "ema.snapshot_every_steps=5"),
        "ema.sigma_rel=long: valid: numbers",
    ),
    "decay-of-rate": (changed("optim.schedule=inverse_sqrt"), "optim.decay_after_steps = 0: valid: 1 or more"),
    "decay-of-cosine": (
        changed("optim.decay_after_steps=5"),
        "decay_after_steps = 5 is not read with optim.name = adamw, optim.schedule = cosine",
    ),
    "workers": (changed("data.workers=-1"), "data.workers = -1: valid: 0 or more"),
    "patch": (changed("model.patch=3"), "image size 8 x 8 is not divisible by the model's patch = 3"),
    "heads": (changed("model.heads=5"), "width = 48 is not divisible by heads = 5"),
    "batch": (changed("batch_size=12"), "batch_size = 12 is not divisible"),
    "accumulate": (changed("optim.accumulate=4"), "batch_size = 16 is not divisible"),
    "mesh": (changed("parallel.mesh.data=3"), "does not fit the 8 devices present"),
    "mesh-of-nothing": (changed("parallel.mesh.data=0"), "sizes are positive"),
    "strategy": (changed("parallel.strategy=zero"), "parallel.strategy = 'zero': valid: dp, fsdp, fsdp_tp"),
    "axis-without-use": (changed("parallel.mesh.tensor=2"), "parallel.strategy = 'dp' shards nothing on it"),
    "heads-on-mesh": (
        changed("parallel.mesh.tensor=8", "parallel.strategy=fsdp_tp", "parallel.replicate_below=0"),
        "3 is not divisible by the 8 devices",
    ),
    # missing data
    "folder": (changed("data.name=folder", "data.dir=nothing", "data.channels=3"), "data.dir='nothing'"),
    "tfds": (
        (f"train --config={ROOT}/configs/cifar10.py:runlocal --workdir=new --config.data.dir=nothing").split(),
        "download_and_prepare()",
    ),
    "latents": (("train", IMAGENET, "--workdir=new", "--config.data.dir=nothing"), "make them with: python -m diffjax"),
    # folders
    "another-config": (
        ("train", f"--config={QUICKSTART}", "--workdir=run", "--config.seed=5", "--config.optim.lr=0.5"),
        "seed: 0 -> 5",
    ),
    "changed-shapes": (
        again("total_steps=2", "optim.name=adafactor"),
        "use another --workdir, or give --config.optim.name=adamw to continue as before\n",
    ),
    "accept-of-shapes": (
        (*again("total_steps=2", "optim.name=adafactor"), "--accept=optim.name"),
        "--accept=optim.name: the run's state does not fit: opt_state/",
    ),
    "changed-rate": (again("total_steps=2", "optim.lr=0.5"), " to continue as before, or --accept=optim.lr to"),
    "accept-of-nothing": ((*TRAIN, "--accept=steps"), "--accept=steps: the config has no such leaf"),
    "workdir-is-a-file": (("train", f"--config={QUICKSTART}", "--workdir=text"), "--workdir=text"),
    "inspect-nothing": (("inspect", "--workdir=folder"), "--workdir=folder is not a run folder"),
    "inspect-a-file": (("inspect", "--workdir=text"), "--workdir=text is not a run folder"),
    "inspect-step": (("inspect", "--workdir=run", "--step=7"), "--step=7: no such checkpoint in run; complete: [2]"),
    # samples
    "sample-neither": (("sample", "--num=2", "--out=new.npz"), "give one of --workdir, --params and --checkpoint"),
    "sample-both": (("sample", "--num=2", "--out=new.npz", "--workdir=run", "--params=params"), "give one of"),
    "sample-suffix": (("sample", "--num=2", "--out=new.png", "--workdir=run"), "ends in .npz"),
    "sample-step": (("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--step=7"), "no checkpoint 7 in run"),
    "sample-folder": (("sample", "--num=2", "--out=new/s.npz", "--workdir=folder"), "no such file"),
    "sample-config": (
        ("sample", "--num=2", "--out=new/s.npz", "--workdir=run", f"--config={QUICKSTART}"),
        "--workdir has its own config",
    ),
    "sample-leaf": (("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--config.x=1"), "no leaf 'x'"),
    "sample-model-leaf": (
        ("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--config.model.width=96"),
        "model.width cannot change what a run was trained for",
    ),
    "sample-seed-leaf": (
        ("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--config.seed=7"),
        "seed cannot change",
    ),
    "sample-negative-seed": (("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--seed=-1"), "--seed=-1"),
    "sample-into-a-bucket": (("sample", "--num=2", "--out=gs://b/s.npz", "--workdir=run"), "only local"),
    "sample-unused-step": (
        ("sample", "--num=2", "--out=new/s.npz", "--params=params", f"--config={QUICKSTART}", "--step=2"),
        "--step",
    ),
    "sample-unused-weights": (
        ("sample", "--num=2", "--out=new/s.npz", "--params=params", f"--config={QUICKSTART}", "--weights=params"),
        "--weights",
    ),
    "params-without-config": (
        ("sample", "--num=2", "--out=new/s.npz", "--params=params"),
        "params: no run made these parameters; --config says how to sample them",
    ),
    "params-of-another": (
        ("sample", "--num=2", "--out=new/s.npz", "--params=params", f"--config={QUICKSTART}"),
        "params holds a DiT with channels = 3, not 1, num_classes = 5, not 10, as the config's data says",
    ),
    "params-of-nothing": (
        ("sample", "--num=2", "--out=new/s.npz", "--params=folder", f"--config={QUICKSTART}"),
        "holds no converted parameters",
    ),
    "guide-without-weight": (
        ("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--guide=run", "--config.sampling.guidance=1"),
        "leaves a guide without effect",
    ),
    "guide-of-nothing": (
        ("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--guide=folder"),
        "--guide=folder is neither a run folder nor",
    ),
    "guide-of-another-kind": (
        ("sample", "--num=2", "--out=new/s.npz", "--workdir=run", "--guide=params"),
        "params holds a DiT with channels = 3, not 1, num_classes = 5, not 10",
    ),
    "switch-off-with-value": (
        (*TRAIN, "--noconfig.data.flip=true"),
        "--noconfig.data.flip: takes no value; write --config.data.flip=VALUE",
    ),
    # evaluation
    "evaluate-nothing": (("evaluate",), "give --reference with either --samples or --workdir, or --compare"),
    "evaluate-missing": (("evaluate", "--samples=no.npz", "--reference=digits"), "no.npz: no such file or folder"),
    "evaluate-text": (("evaluate", "--samples=text.npz", "--reference=digits"), "text.npz cannot be read"),
    "evaluate-layout": (
        ("evaluate", "--samples=other.npz", "--reference=digits"),
        "other.npz holds no images, an array arr_0",
    ),
    "evaluate-altered": (("evaluate", "--samples=altered.npz", "--reference=digits"), "does not describe altered.npz"),
    "compare-text": (("evaluate", "--compare", "text.json", "text.json"), "text.json"),
    "compare-one": (("evaluate", "--compare", "text.json"), "--compare takes two result files"),
    "sweep-out": (
        ("sweep", *SWEEP, "--sampler=ddim:2", "--out=new.txt"),
        "--out=new.txt: give a file that ends in .json",
    ),
    "sweep-sampler": (("sweep", *SWEEP, "--sampler=euler_heun:2"), "'euler_heun' is unknown; valid: ddpm, ddim"),
    "sweep-adaptive": (("sweep", *SWEEP, "--sampler=dopri5:2"), "'dopri5' chooses its steps as it goes; valid: ddpm"),
    "sweep-without-steps": (("sweep", *SWEEP, "--sampler=ddim,edm:9"), "need --steps"),
    "sweep-unused-steps": (("sweep", *SWEEP, "--sampler=edm:9", "--steps=3"), "--steps has no effect"),
    "sweep-steps": (("sweep", *SWEEP, "--sampler=edm", "--steps=few"), "--steps=few: valid: whole numbers"),
    "sweep-own-steps": (("sweep", *SWEEP, "--sampler=edm:few"), "--sampler=few: valid: whole numbers"),
    "sweep-guidance": (("sweep", *SWEEP, "--sampler=edm:2", "--guidance=much"), "--guidance=much: valid: numbers"),
    "sweep-undefined": (("sweep", *SWEEP, "--sampler=heun:2"), "sampler 'heun' moves in continuous time"),
    "sweep-too-many-steps": (("sweep", *SWEEP, "--sampler=ddim:1001"), "1001"),
    "sweep-reference": (
        ("sweep", "--workdir=run", "--sampler=ddim:2", "--reference=emoji32", "--out=new.json"),
        "the images are 8 x 8 and those of the reference 32 x 32",
    ),
    "sweep-over-something-else": (
        ("sweep", "--workdir=run", "--sampler=ddim:2", "--reference=digits", "--out=text.json"),
        "text.json is there already and does not say what it is; choose another --out, or --overwrite replaces it",
    ),
    "sweep-not-a-run": (
        ("sweep", "--workdir=folder", "--sampler=ddim:2", "--reference=digits", "--out=new.json"),
        "folder/config.json: no such file",
    ),
    "sweep-config": (("sweep", *SWEEP, "--sampler=ddim:2", "--config.seed=1"), "sweep takes no --config"),
    # averages
    "ema-not-a-run": (("ema", "--workdir=folder", "--sigma-rel=0.1", "--out=new"), "folder/config.json: no such file"),
    "ema-without-snapshots": (("ema", "--workdir=run", "--sigma-rel=0.1", "--out=new"), "run has no snapshots"),
    "ema-into-full": (
        ("ema", "--workdir=run", "--sigma-rel=0.1", "--out=params"),
        "params exists and is not an empty folder",
    ),
    "ema-length": (("ema", "--workdir=run", "--sigma-rel=0.5", "--out=new"), "sigma_rel = 0.5: valid: above 0 to"),
    "ema-length-text": (("ema", "--workdir=run", "--sigma-rel=long", "--out=new"), "--sigma_rel=long"),
    "ema-bucket": (("ema", "--workdir=run", "--sigma-rel=0.1", "--out=gs://b/new"), "--out=gs://b/new: only local"),
    # conversion
    "convert-missing-file": ((*CONVERT, "--checkpoint=no.pt"), "no.pt: no such file"),
    "convert-text": ((*CONVERT, "--checkpoint=text"), "text"),
    "convert-pickle": ((*CONVERT, "--checkpoint=evil.pt"), "refused to load nt.system"),
    "convert-missing-key": ((*CONVERT, "--checkpoint=missing.pt"), "x_embedder.proj.bias"),
    "convert-unexpected-key": ((*CONVERT, "--checkpoint=unexpected.pt"), "extra.weight"),
    "convert-family": (
        ("convert", "--family=vit", "--out=new", "--checkpoint=good.pt"),
        "'vit' are unknown; valid: dit",
    ),
    "convert-into-full": (
        ("convert", "--family=dit", "--arguments=num_heads=2", "--checkpoint=good.pt", "--out=run"),
        "run exists and is not an empty folder",
    ),
    # timing
    "bench-config": (("bench", f"--config={ROOT}/configs/nothing.py"), "no such file"),
    "bench-model": (("bench", f"--config={QUICKSTART}", "--config.model.heads=5"), "not divisible by heads = 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(world, monkeypatch, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(world)
    before = listing(world)
    capsys.readouterr()
    assert main(list(arguments)) == 2
    printed, error = capsys.readouterr()
    assert message in error
    assert error.startswith("diffjax: ")
    assert error.count("diffjax: ") == 1
    assert error.count("\n") == 1
    assert printed == "" or arguments[0] == "convert"
    assert listing(world) == before


def test_several_differing_leaves_are_all_named(world, capsys):
    assert main([*train_arguments(world / "run", "total_steps=3", "optim.lr=0.5"), "--accept=total_steps"]) == 2
    error = capsys.readouterr().err
    assert "another config: optim.lr: " in error
    assert " -> 0.5 (stored" in error
    assert "total_steps" not in error


def test_a_run_goes_on_without_its_recipe(world, capsys):
    """With the config of the folder, in which the same leaves may change."""
    assert main(["train", f"--workdir={world / 'run'}"]) == 0
    assert "is finished: step 2 of 2" in capsys.readouterr().out
    assert main(["train", f"--workdir={world / 'run'}", "--config.optim.lr=0.5"]) == 2
    assert "another config: optim.lr: " in capsys.readouterr().err


@pytest.mark.slow
def test_layout_may_change_and_accepted_leaves_too(world, tmp_path, capsys):
    os.makedirs(tmp_path / "run")
    assert main(train_arguments(tmp_path / "run", "total_steps=2")) == 0
    more = train_arguments(tmp_path / "run", "total_steps=3", "data.threads=0")
    assert main([*more, "--accept=total_steps"]) == 0
    assert "continuing with data.threads: 1 -> 0; total_steps: 2 -> 3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_whose_run_made_no_step_is_like_a_new_one(world, tmp_path, capsys):
    """Another config is not refused there, nor does the run continue with it."""
    (tmp_path / "run").mkdir()
    stored = json.loads((world / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored | {"seed": 5}))
    capsys.readouterr()
    assert main(train_arguments(tmp_path / "run", "total_steps=1", "data.threads=0", "model.width=24")) == 0
    printed = capsys.readouterr().out
    assert "continuing with" not in printed
    assert "starting: " in printed
    assert read(tmp_path / "run" / "config.json").seed == 0


def test_a_config_json_that_is_none(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[]")
    assert main(train_arguments(tmp_path)) == 2
    assert "not the config of a run" in capsys.readouterr().err


def test_a_config_json_of_another_version(world, tmp_path, capsys):
    """What an earlier one did not have is at its default; what this one does not know is refused."""
    path = world / "run" / "config.json"
    stored = json.loads(path.read_text())
    for section, leaf in (("diffusion", "label_drop"), ("data", "augment"), ("ema", "sigma_rel")):
        less = {**stored, section: {name: value for name, value in stored[section].items() if name != leaf}}
        (tmp_path / "config.json").write_text(json.dumps(less))
        assert read(tmp_path / "config.json") == read(path)
    more = {
        "version": {**stored, "version": stored["version"] + 1},
        "leaf": {**stored, "data": {**stored["data"], "sise": 3}},
    }
    reasons = {
        "version": "written by a later version of diffjax",
        "leaf": "no leaf 'data.sise'; did you mean data.size",
    }
    for name, values in more.items():
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert main(["sample", f"--workdir={tmp_path}", "--num=1", f"--out={tmp_path / 's.npz'}"]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'config.json'}: " in error
        assert reasons[name] in error
        assert error.count("\n") == 1


def test_results_do_not_go_where_a_folder_is(world, tmp_path, capsys):
    samples = tmp_path / "s.npz"
    write_samples(samples, np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), {})
    (tmp_path / "scores.json").mkdir()
    assert main(["evaluate", f"--samples={samples}", "--reference=digits", f"--out={tmp_path / 'scores.json'}"]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_refused_changes_leave_the_stored_config_alone(world, capsys):
    before = (world / "run" / "config.json").read_text()
    for change in ("model.width=96", "data.split=test", "seed=3"):
        assert main([*train_arguments(world / "run", change, "total_steps=3"), "--accept=total_steps"]) == 2
    assert (world / "run" / "config.json").read_text() == before
