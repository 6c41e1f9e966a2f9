"""What a user can ask for: one file per command, named after it."""

from pathlib import Path

from diffjax.errors import UserError


def local_path(flag: str, text: str) -> Path:
    """The path of a flag; UserError for a URL, which would become a local folder of that name."""
    if "://" in text:
        raise UserError(f"--{flag}={text}: only local and mounted paths are read and written; mount the bucket")
    return Path(text)


def make_folder(out: Path) -> None:
    """The folder of a file to be, before the work, so that a place that cannot be written costs no time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; give a writable folder") from error
