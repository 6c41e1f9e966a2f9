"""Train a config in a run folder. The same command on an existing folder resumes it.

python -m diffjax train --config=configs/quickstart.py:model=dit --workdir=runs/a --config.optim.lr=2e-4
python -m diffjax train --config=configs/quickstart.py:model=dit --workdir=runs/b --config.init.from=params/dit
"""

from absl import flags

from diffjax.commands import define_distributed, define_path
from diffjax.config import load
from diffjax.config.load import resumed
from diffjax.parallel import hosts
from diffjax.training import profile
from diffjax.training.loop import train


def define_flags(values: flags.FlagValues) -> None:
    text = flags.DEFINE_string
    text("config", None, "recipe and its argument: configs/NAME.py:ARGUMENT", flag_values=values)
    define_path("workdir", None, "run folder, made or resumed", values)
    flags.DEFINE_list(
        "accept", [], "leaves (total_steps,...) in which the config may differ from the folder's", flag_values=values
    )
    text("profile", None, "FIRST:LAST: write a trace of these steps to WORKDIR/profile", flag_values=values)
    define_distributed(values)
    flags.mark_flags_as_required(["config", "workdir"], values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    steps = profile.parse(values.profile) if values.profile else None
    config, stored = load(values.config, overrides), values.workdir / "config.json"
    if stored.is_file():
        config = resumed(stored, config, overrides)
    train(config, values.workdir, tuple(values.accept), steps)
