"""The options of the backbones: their docs, their defaults, and the tables of published and family names."""

import typing

import pytest

from diffjax import models
from diffjax.errors import UserError
from diffjax.options import REQUIRED, check, options

# What follows from the data and the training method is no option.
FIELDS = {"channels", "num_classes", "null_class", "learn_sigma", "label_drop", "vocabulary", "source_vocabulary"}
COMPUTE = {"dtype", "remat", "attention", "scan", "depthwise"}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_field_is_an_option_or_follows_from_data_and_method(family):
    module = models.FAMILIES[family]
    fields = set(module.__dataclass_fields__) - {"parent", "name"}
    assert set(options(module)) == fields - FIELDS


@pytest.mark.parametrize("family", models.FAMILIES)
def test_docs_are_one_line_and_kinds_are_right(family):
    for name, option in options(models.FAMILIES[family]).items():
        doc = option.leaf.doc
        assert doc, name
        assert "\n" not in doc, name
        assert len(doc) <= 110, name
        assert doc == doc.strip().rstrip("."), name
        compute = name in COMPUTE and (family, name) != ("VAE", "attention")  # whether there is any
        assert option.leaf.kind == ("compute" if compute else "identity"), name
        assert option.leaf.fixed == (not compute), name


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.MODELS])
def test_defaults_are_valid(name):
    for key, option in models.option_table(name).items():
        if option.default is not REQUIRED:
            assert check(key, option, option.default) == option.default


def test_the_sizes_of_a_published_name_are_its_defaults():
    table = models.option_table("DiT-XL/2")
    sizes = {name: table[name].default for name in ("patch", "depth", "width", "heads", "mlp_ratio")}
    assert sizes == {"patch": 2, "depth": 28, "width": 1152, "heads": 16, "mlp_ratio": 4.0}
    assert models.option_table("u-dit-s")["depth"].default == (2, 5, 8, 5, 2)
    digit = models.option_table("DiGIT-L-stage2-NAR")
    assert digit["causal"].default is False
    assert "vocabulary" not in digit


def test_the_sizes_of_a_family_have_no_defaults():
    table = models.option_table("DiT")
    assert [name for name, option in table.items() if option.default is REQUIRED] == [
        "patch",
        "depth",
        "width",
        "heads",
    ]


def test_families_of_names():
    assert models.family_of("dit-xl-2") == "DiT"
    assert models.family_of("DiffiT-FFHQ64") == "DiffiT-UNet"
    assert models.family_of("udit") == "U-DiT"
    for call in (models.family_of, models.option_table):
        with pytest.raises(UserError, match="'UNet' is unknown; valid: DiT, DiS"):
            call("UNet")


@pytest.mark.parametrize(
    "family, name, default", [("DiS", "scan", None), ("U-DiT", "depthwise", None), ("DiT", "attention", "xla")]
)
def test_none_and_the_empty_word_let_the_backend_choose(family, name, default):
    option = options(models.FAMILIES[family])[name]
    assert option.default == default
    if default is None:
        assert option.type == str | None
        assert check(name, option, "") == ""
        assert check(name, option, None) is None
    else:
        with pytest.raises(UserError, match="attention = '': valid: xla, cudnn"):
            check(name, option, "")


def test_the_types_are_those_of_the_fields():
    hints = typing.get_type_hints(models.FAMILIES["U-DiT"])
    for name, option in options(models.FAMILIES["U-DiT"]).items():
        assert option.type == hints[name]
