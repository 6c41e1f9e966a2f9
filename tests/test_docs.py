"""README and docs: their Python examples run as they stand, and what they link to is there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models
from diffjax.__main__ import main
from diffjax.weights import to_reference
from tests.programs import ROOT
from tests.weights.torch_writer import tensor, write_zip

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the recipes, to work in as in the project's own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_example_of_the_readme_trains_samples_and_sees_features(checkout, capsys):
    [text] = examples("README.md")
    assert len(text.splitlines()) <= 20
    values: dict = {}
    exec(text, values)
    assert float(capsys.readouterr().out.removeprefix("loss ")) < 1.0
    assert values["images"].shape == (16, 8, 8, 1)
    assert values["images"].dtype == np.float32
    assert np.abs(values["images"]).max() <= 1
    assert values["tokens"].shape == (16, 16, 96)


@pytest.mark.slow
def test_the_examples_of_the_page_on_python_run(checkout):
    recipe = "--config=configs/quickstart.py:model=dit,runlocal"
    assert main(["train", recipe, "--workdir=runs/quickstart-dit"]) == 0
    model = models.create("DiT", patch=2, depth=1, width=48, heads=6, channels=4, num_classes=10)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    state = {key: tensor(value, key) for key, value in to_reference("dit", model, params).items()}
    write_zip(checkout / "DiT-S-2.pt", state)
    values: dict = {}
    for text in examples("docs/python.md"):
        exec(text, values)
    assert values["images"].shape == (16, 8, 8, 1)
    assert values["out"].shape == (1, 32, 32, 8)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]


def test_every_recipe_is_in_the_list():
    text = (ROOT / "docs/training.md").read_text()
    recipes = [path.name for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common")]
    assert not [name for name in recipes if f"(../configs/{name})" not in text]
