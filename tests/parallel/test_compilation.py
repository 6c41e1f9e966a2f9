"""The compilation cache: on by default, moved and turned off by one variable."""

import jax
import pytest

from diffjax.parallel import compilation

NAME = "jax_compilation_cache_dir"


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """No cache set by anybody, and a cache folder of the user's own; what the tests set is put back."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update(NAME, None)
    yield tmp_path / "cache"
    jax.config.update(NAME, before)


def test_on_by_default(unset):
    compilation.use_cache()
    folder = compilation.default_folder()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.is_dir()
    assert folder.parent == unset / "diffjax"


@pytest.mark.parametrize("value", ["", "/somewhere/else"])
def test_the_variable_of_jax_decides(unset, monkeypatch, value):
    monkeypatch.setenv(compilation.VARIABLE, value)  # jax itself read it when it was imported
    compilation.use_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert not unset.exists()


def test_a_setting_of_jax_stands(unset, tmp_path):
    jax.config.update(NAME, str(tmp_path / "own"))
    compilation.use_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_a_folder_that_cannot_be_made_is_said(unset, caplog, monkeypatch):
    unset.write_text("a file")
    monkeypatch.setattr(compilation.logger, "propagate", True)
    with caplog.at_level("INFO"):
        compilation.use_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert f"no compilation cache: {compilation.default_folder()} cannot be written" in caplog.text


def test_processors_do_not_share_programs(unset, monkeypatch):
    one = compilation.default_folder()
    monkeypatch.setattr(compilation, "_processor", lambda: "another")
    assert compilation.default_folder() != one
