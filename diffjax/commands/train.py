"""Train a config in a run folder. The same command, or --workdir alone, resumes an existing one.

python -m diffjax train --config=configs/quickstart.py:model=dit --workdir=runs/a --config.optim.lr=2e-4
python -m diffjax train --config=configs/imagenet256.py --workdir=runs/b --config.init.from=params/dit-xl
python -m diffjax train --workdir=runs/a
"""

from absl import flags

from diffjax.commands import define_distributed, define_path
from diffjax.config import Config, load, override, read
from diffjax.config.load import differences, resumed
from diffjax.config.trained import names_model, of_start
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.training import profile
from diffjax.training.finetune import model_of
from diffjax.training.loop import train

INTERRUPTED = "the last checkpoint is kept; the same command resumes from it"
REQUIRED = ("workdir",)


def define_flags(values: flags.FlagValues) -> None:
    text = flags.DEFINE_string
    help = "recipe and its argument: configs/NAME.py:ARGUMENT; the folder's own config by default, to resume"
    text("config", None, help, flag_values=values)
    define_path("workdir", None, "run folder, made or resumed", values)
    flags.DEFINE_list(
        "accept", [], "leaves (total_steps,...) in which the config may differ from the folder's", flag_values=values
    )
    text("profile", None, "FIRST:LAST: write a trace of these steps to WORKDIR/profile", flag_values=values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    steps = profile.parse(values.profile) if values.profile else None
    train(_config(values, overrides), values.workdir, tuple(values.accept), steps)


def _config(values: flags.FlagValues, overrides: list[str]) -> Config:
    """The config of the recipe, as the run that the folder holds means it; without a recipe that of the run."""
    stored = values.workdir / "config.json"
    if values.config is None:
        if not stored.is_file():
            raise UserError(f"train: {values.workdir} holds no run to resume; --config says what to train, a recipe")
        return override(read(stored), overrides)
    config = load(values.config, overrides)
    old = read(stored) if stored.is_file() else None
    if not names_model(values.config, overrides):
        own, config = config, of_start(config, overrides, old, model_of)
        if not old and hosts.is_lead() and (other := differences(own, config)):
            print(f"the backbone is that of init.from: {'; '.join(other.values())}", flush=True)
    return resumed(stored, config, overrides) if old else config
