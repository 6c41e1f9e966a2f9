"""The table of public files, and their names in the place of paths."""

import re
from pathlib import Path

import pytest

from diffjax.commands.fetch import size_text
from diffjax.errors import UserError
from diffjax.weights import FAMILIES, public
from tests.programs import ROOT

FILES = [(name, file) for name, row in public.ROWS.items() for file in row.files]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", public.ROWS)
def test_a_row_is_whole(name):
    row = public.ROWS[name]
    assert row.family in {*FAMILIES, public.REFERENCE}
    assert re.fullmatch(r"[\w.-]+", name)
    assert row.page
    assert row.licence
    assert row.purpose
    assert not row.address or row.address.startswith("https://")
    assert not any("|" in text for text in row if isinstance(text, str))  # they stand in a table


@pytest.mark.parametrize("name, file", FILES, ids=[f"{name} {file.name}" for name, file in FILES])
def test_a_file_has_a_name_and_a_hash_that_can_be(name, file):
    assert re.fullmatch(r"[\w][\w.-]*", file.name)
    assert re.fullmatch(r"([0-9a-f]{64})?", file.sha256)
    assert file.size >= 0


def test_the_sizes_hold_the_parameters():
    """In float32, and little else: what shapes say about the published files."""
    parameters = {"sd-vae-ft-ema": 83_653_863, "sd-vae-ft-mse": 83_653_863, "taesd": 2_445_063}
    for name, count in parameters.items():
        assert 0 < public.ROWS[name].files[0].size - 4 * count < 50_000


def test_a_name_is_the_fetched_file(cache):
    kept = cache / "weights/sd-vae-ft-ema" / public.WEIGHTS
    with pytest.raises(UserError, match="not fetched yet; `python -m diffjax fetch sd-vae-ft-ema` does that"):
        public.find("sd-vae-ft-ema")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    assert public.find("sd-vae-ft-ema") == public.find(Path("sd-vae-ft-ema")) == kept
    assert public.find("sd-vae-ft-em") == Path("sd-vae-ft-em")  # a path that is not there
    Path("sd-vae-ft-ema").mkdir()
    assert public.find("sd-vae-ft-ema") == Path("sd-vae-ft-ema")


def test_the_cache_of_the_user(monkeypatch):
    monkeypatch.delenv("DIFFJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert public.folder_of("taesd") == Path("/somewhere/diffjax/weights/taesd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert public.folder_of("taesd") == Path.home() / ".cache/diffjax/weights/taesd"
    monkeypatch.setenv("DIFFJAX_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="DIFFJAX_CACHE=gs://bucket/cache: only local and mounted paths"):
        public.folder_of("taesd")


def table_row(name):
    row = public.ROWS[name]
    where = row.page if row.address else f"{row.page} (by hand)"
    return f"| `{name}` | {size_text(row)} | {row.licence} | {where} | {row.purpose} |"


def test_the_page_has_the_table():
    text = (ROOT / "docs/weights.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == [table_row(name) for name in public.ROWS]
