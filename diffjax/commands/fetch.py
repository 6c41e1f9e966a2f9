"""Fetch public weights and references into the cache, DIFFJAX_CACHE (~/.cache/diffjax by default); nothing else does.

python -m diffjax fetch                                        the names
python -m diffjax fetch sd-vae-ft-ema
python -m diffjax fetch DiT-XL-2-256x256 --from=DiT-XL-2-256x256.pt
python -m diffjax fetch taesd --from=https://mirror.example/taesd/

Afterwards the name stands for the file in `convert --checkpoint`, `--autoencoder` and autoencoder.weights. A file is
kept when it is whole and, where that is known, of the published size and sha256. --from is a path or another address;
of a row with two files, that of the weights or of their folder.
"""

import shlex
from pathlib import Path

from absl import flags

from diffjax.commands import define_path
from diffjax.errors import UserError, writing
from diffjax.files import only_writer
from diffjax.weights import public

INTERRUPTED = "what has arrived is kept, the same command continues"
FIRST = "name"  # the flag that an argument without a name is


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "name", None, "which one, also without --name=; the list of them by default", flag_values=values
    )
    flags.DEFINE_string("from", None, "a path or address to take it from, not the published one", flag_values=values)
    define_path("out", None, "folder for the files, in place of the cache", values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    source = values["from"].value or ""
    if values.name:
        fetch(values.name, source, values.out)
    elif source or values.out:
        raise UserError("fetch: --from and --out are of one file; give its name, `python -m diffjax fetch` lists them")
    else:
        show()


def show() -> None:
    """Print the table of names."""
    heads = ("name", "size", "licence", "what it is")
    rows = [(name, size_text(row), row.licence, row.purpose) for name, row in public.ROWS.items()]
    widths = [max(len(each[i]) for each in (heads, *rows)) for i in range(3)]
    for name, size, licence, purpose in (heads, *rows):
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {licence:<{widths[2]}}  {purpose}")


def size_text(row: public.Row) -> str:
    """The size of the first file of a row; "?" where it is not known."""
    return f"{row.files[0].size / 1e6:,.0f} MB" if row.files[0].size else "?"


def fetch(name: str, source: str, out: Path | None) -> None:
    """Bring the files of a row, and say what came."""
    row, folder = public.row_of(name), out or public.folder_of(name)
    public.check_source(name, folder, source)
    print(f"{name}: {row.purpose}; licence: {row.licence} ({row.page})", flush=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        for path, record, new in public.fetch(name, folder, source):
            what = f"from {record.source}" if new else f"from {record.source}, there since {record.date}, unchanged"
            print(f"{path}: {record.size:,} bytes, sha256 {record.sha256}, {what}", flush=True)
    print(f"next: {next_command(name, path)}")


def next_command(name: str, main: Path) -> str:
    """What to do with the fetched file `main` of a row."""
    family = public.ROWS[name].family
    path = shlex.quote(str(main))
    given = name if main.parent == public.folder_of(name) else path
    if family in ("vae", "tiny_vae"):
        return f"python -m diffjax sample --workdir=RUN --num=64 --autoencoder={given} --out=samples.npz"
    if family == public.REFERENCE:
        return f"python -m diffjax evaluate --samples=samples.npz --reference={path}"
    return f"python -m diffjax convert --family={family} --checkpoint={given} --out=params/{name}"
