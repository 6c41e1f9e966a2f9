"""Seconds from the kill of a training run to its first new step, by part.

    python -m tests.benchmarks.restart [--config=configs/quickstart.py:model=dit] [--config.LEAF=VALUE ...] [--starts=3]

Trains in a temporary folder until there is a checkpoint, ends the process with SIGKILL and starts it again `--starts`
times, each time as far as the first new step: with the programs in the compilation cache, then once with an empty one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.programs import ROOT

PARTS = {
    "start-up": "the interpreter starts and imports jax and diffjax",
    "build": "from the command line to the built experiment",
    "restore": "data set, checkpoint and position in the data",
    "data": "the first batch",
    "compile": "the program of the step, compiled or read from the cache, and the step itself",
}

TIMED = """
import json, os, sys, time
began = float(sys.argv.pop(1))
seconds = {}

def mark(part):
    seconds[part] = time.time() - began - sum(seconds.values())

def mark_after(owner, name, part):
    function = getattr(owner, name)
    def marking(*args, **kwargs):
        result = function(*args, **kwargs)
        if part not in seconds:
            mark(part)
        if part == "compile":
            print("PARTS " + json.dumps(seconds), flush=True)
            os._exit(0)
        return result
    setattr(owner, name, marking)

from diffjax.__main__ import main
from diffjax.training import loop
mark("start-up")
mark_after(loop, "build", "build")
mark_after(loop, "_initial_or_restored", "restore")
mark_after(loop.pipeline.Batches, "__next__", "data")
mark_after(loop.Reporter, "step", "compile")
sys.exit(main(sys.argv[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py:model=dit")
    parser.add_argument("--starts", type=int, default=3)
    options, leaves = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["train", f"--config={options.config}", f"--workdir={run}", "--config.evals.samples.every_steps=0"]
        arguments += ["--config.checkpoint.every_steps=2", "--config.log.every_steps=1", *leaves]
        kill_after_a_checkpoint(arguments, run, Path(folder))
        found = [restart(arguments, Path(folder) / "cache") for _ in range(options.starts)]
        cold = restart(arguments, Path(folder) / "empty")
    print(f"{options.config} {' '.join(leaves)}; medians of {options.starts} starts, and one with an empty cache")
    for part, words in PARTS.items():
        print(f"{part:9s} {np.median([each[part] for each in found]):6.2f} s  {cold[part]:6.2f} s  {words}")
    print(f"{'together':9s} {np.median([sum(each.values()) for each in found]):6.2f} s  {sum(cold.values()):6.2f} s")


def kill_after_a_checkpoint(arguments: list[str], run: Path, folder: Path) -> None:
    with (folder / "log").open("w") as log:
        program = [sys.executable, "-m", "diffjax", *arguments]
        process = subprocess.Popen(program, cwd=ROOT, env=environment(folder / "cache"), stdout=log, stderr=log)
    # A checkpoint has its name when it is complete.
    while process.poll() is None and not (run / "checkpoints" / "2").is_dir():
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit(f"the run ended before it was killed:\n{(folder / 'log').read_text()}")
    process.send_signal(signal.SIGKILL)
    process.wait()


def restart(arguments: list[str], cache: Path) -> dict[str, float]:
    """The seconds of each part."""
    program = [sys.executable, "-c", TIMED, str(time.time()), *arguments]
    done = subprocess.run(program, cwd=ROOT, env=environment(cache), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PARTS ")]
    if not lines:
        raise SystemExit(f"the run ended before its first step:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("PARTS "))


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}


if __name__ == "__main__":
    main()
