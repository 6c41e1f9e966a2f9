"""Helpers of the tests that run diffjax as its user does: in this process, or as a program of its own."""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from diffjax.commands.tokenize import tokenize
from diffjax.config import Config, load
from diffjax.contracts import Method
from diffjax.experiment import model_maker
from diffjax.inputs import data_spec
from diffjax.methods import METHODS

ROOT = Path(__file__).parent.parent
BACKBONES = ("dit", "dis", "udit", "diffit", "diffit-latent", "digit")  # rows of the quickstart
TINY = "configs/quickstart.py:model=dit,runlocal"
QUIET = ("evals.samples.every_steps=0", "log.tensorboard=false")


def tiny_config(*overrides: str, model: str = "dit") -> Config:
    """Seconds on a CPU: two or three blocks of width 48 on the digits; no pictures, no TensorBoard unless asked for."""
    recipe = ROOT / TINY.replace("=dit", f"={model}")
    return load(str(recipe), [f"--config.{o}" for o in (*QUIET, *_data(model), *overrides)])


def method_of(config: Config) -> Method:
    """The method of a config, without the rest of the experiment."""
    make_model = model_maker(config.model.name, config.model.options)
    return METHODS[config.method].build(make_model, data_spec(config), config.settings)


def train_arguments(workdir: Path, *overrides: str, model: str = "dit") -> list[str]:
    recipe = TINY.replace("=dit", f"={model}")
    leaves = (*QUIET, *_data(model), *overrides)
    return ["train", f"--config={recipe}", f"--workdir={workdir}", *(f"--config.{leaf}" for leaf in leaves)]


def _data(model: str) -> tuple[str, ...]:
    return (f"data.dir={codes_of_digits()}",) if model == "digit" else ()


@functools.cache
def codes_of_digits() -> Path:
    """A folder of tokens that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="tokens-of-digits-"))
    atexit.register(shutil.rmtree, folder)
    recipe = ROOT / TINY.replace("=dit", "=digit")
    tokenize(load(str(recipe), ["--config.tokens.iterations=1"]), folder)
    return folder


def start(
    arguments: list[str], log: Path, *, program: tuple[str, ...] = ("-m", "diffjax"), **environment: str
) -> subprocess.Popen:
    """`python -m diffjax ...` on one CPU device, in a process group of its own."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **environment}
    if "NPROC" not in environment:
        variables.pop("NPROC", None)  # meant for the eight devices of this process
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL, to the program alone: its worker processes have to notice by themselves."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], object], process: subprocess.Popen, log: Path, seconds: float = 240) -> bool:
    """Poll until `condition()` holds (True) or the program has ended (False)."""
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > until:
            kill(process)
            raise TimeoutError(log.read_text())
        time.sleep(0.002)
    return True


def complete_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []
