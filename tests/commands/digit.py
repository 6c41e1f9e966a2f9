"""A small model of tokens of the digits, through the command line: its tokens and its run."""

from pathlib import Path

from diffjax.__main__ import main
from tests.programs import ROOT, train_arguments

VOCABULARY = 16
RECIPE = f"--config={ROOT}/configs/quickstart.py:model=digit,runlocal"
SMALL = (f"data.vocabulary={VOCABULARY}", "tokens.iterations=4")


def tokenize_arguments(out: Path, *leaves: str, codebook: Path | None = None) -> list[str]:
    given = [f"--codebook={codebook}"] if codebook else []
    return ["tokenize", RECIPE, f"--out={out}", *given, *(f"--config.{leaf}" for leaf in (*SMALL, *leaves))]


def tokenize(out: Path, *leaves: str, codebook: Path | None = None) -> Path:
    assert main(tokenize_arguments(out, *leaves, codebook=codebook)) == 0
    return out


def run_arguments(workdir: Path, tokens: Path, *leaves: str) -> list[str]:
    """The command that trains for four steps, fast enough to change what is drawn."""
    fast = ("optim.warmup_steps=0", "ema.decay=0.5")
    return train_arguments(workdir, *SMALL, *fast, f"data.dir={tokens}", *leaves, model="digit")


def train(workdir: Path, tokens: Path, *leaves: str) -> Path:
    assert main(run_arguments(workdir, tokens, *leaves)) == 0
    return workdir


def mistake(capsys, arguments: list[str]) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffjax: ")
    assert error.count("\n") == 1
    return error
