"""The flags of every command: each is read, listed by --help, and checked as a path where it is one."""

import ast
import importlib
import inspect

import pytest
from absl import flags

from diffjax.__main__ import COMMANDS, main
from diffjax.commands import scoring, trained


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags(command, capsys):
    assert main([command, "--help"]) == 0
    values = flags.FlagValues()
    importlib.import_module(f"diffjax.commands.{command}").define_flags(values)
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed or f"--[no]{name}" in printed for name in values)
    assert "(default )" not in printed


def test_the_examples_of_a_command_have_the_flags_that_latents_need():
    """Latents of a model without a decoder are no pictures."""
    module = importlib.import_module("diffjax.commands.sample")
    examples = [line for line in module.__doc__.splitlines() if "imagenet256" in line]
    assert [("--raw" in line) for line in examples] == [True]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_read(command):
    module = importlib.import_module(f"diffjax.commands.{command}")
    values = flags.FlagValues()
    module.define_flags(values)
    shared = [scoring, trained]  # which read the flags that they define
    modules = [module, *(each for each in shared if f"from {each.__name__} import" in inspect.getsource(module))]
    nodes = [node for each in modules for node in ast.walk(ast.parse(inspect.getsource(each)))]
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "values"
    }
    read |= {  # values["from"].value: from is a word of Python
        node.value.slice.value
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr == "value"
        and isinstance(node.value, ast.Subscript)
        and isinstance(node.value.slice, ast.Constant)
    }
    assert set(values) <= read


# Flags that are words: a recipe and its argument, an entry of a file, a data set and its part, steps, an address.
WORDS = {"config", "data", "entry", "family", "from", "labels", "metric", "name", "reference", "profile", "split"}
WORDS |= {"weights"}


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_have_a_type(command):
    """A flag that is a path is checked as one, by its type; so a flag of any text is one of few."""
    values = flags.FlagValues()
    importlib.import_module(f"diffjax.commands.{command}").define_flags(values)
    assert {name for name in values if values[name].flag_type() == "string"} <= WORDS


def test_a_log_level_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setenv("DIFFJAX_LOG", "loud")
    assert main(["inspect", "--workdir=x"]) == 2
    assert "DIFFJAX_LOG=loud is unknown; valid: debug" in capsys.readouterr().err
