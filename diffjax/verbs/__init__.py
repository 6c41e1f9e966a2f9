"""What a user can ask for: one file per verb, named after it."""

from pathlib import Path

from diffjax.errors import UserError


def local_path(flag: str, text: str) -> Path:
    """The path of a flag; UserError for a URL, which would become a local folder of that name."""
    if "://" in text:
        raise UserError(f"--{flag}={text}: only local and mounted paths are read and written; mount the bucket")
    return Path(text)
