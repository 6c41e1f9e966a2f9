"""Train a config in a run folder. The same command on an existing folder resumes it.

python -m diffjax train --config=configs/quickstart.py:model=dit --workdir=runs/a --config.optim.lr=2e-4
"""

from absl import flags

from diffjax.training import config as configs
from diffjax.training.loop import train
from diffjax.verbs import local_path


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "recipe and its argument: configs/NAME.py:ARGUMENT", flag_values=values)
    flags.DEFINE_string("workdir", None, "run folder, made or resumed", flag_values=values)
    flags.DEFINE_list(
        "accept", [], "leaves (total_steps,...) in which the config may differ from the folder's", flag_values=values
    )
    flags.mark_flags_as_required(["config", "workdir"], values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    train(configs.load(values.config, overrides), local_path("workdir", values.workdir), tuple(values.accept))
