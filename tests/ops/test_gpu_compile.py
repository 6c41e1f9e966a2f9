"""The GPU kernels pass the compiler for an H100, with the memory that they were meant to need. Nothing is run."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.programs import ROOT

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@pytest.fixture(scope="module")
def reports():
    """What the compiler said of each program, by name; compiled elsewhere, since XLA reads its flags once a process."""
    if not any(map(importlib.util.find_spec, PLUGINS)):
        pytest.skip(
            "NOT CHECKED that the GPU kernels compile: no CUDA plugin; pip install 'diffjax[cuda12]', no GPU needed"
        )
    command = [sys.executable, "-m", "tests.ops.compile_for_h100"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # that of the tests
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def partial_sums(b, tokens, e, n=16):
    """Bytes of what leaves the backward kernel to be summed: dB and dC by blocks of 32 channels, dA, dD and dbias."""
    return 4 * b * (2 * (e // 32) * tokens * n + n * e + 2 * e)


@pytest.mark.slow
def test_both_passes_compile_and_write_no_array_with_states(reports):
    for shape in ((8, 258, 1536), (8, 1026, 3072)):
        for dtype in ("bfloat16", "float32"):
            assert reports[f"forward {shape} {dtype} reverse=False"]["temp"] == 0
            backward = reports[f"backward {shape} {dtype} reverse=False"]
            assert backward["temp"] <= 1.01 * partial_sums(*shape)
    alone = [report for name, report in reports.items() if "reverse=" in name]
    assert [report["kernels"] for report in alone] == [1] * len(alone) != []


@pytest.mark.slow
def test_the_other_direction_copies_nothing(reports):
    for name in ("forward", "backward"):
        there, back = (reports[f"{name} (8, 258, 1536) bfloat16 reverse={reverse}"] for reverse in (False, True))
        assert back["temp"] == there["temp"]


@pytest.mark.slow
def test_eight_devices_scan_their_own_part_and_only_sums_cross(reports):
    assert reports["spread"]["kernels"] == 2
    assert reports["spread"]["collectives"] == ["all-reduce"]
    b, tokens, e, n, chunks = 4, 258, 384, 16, 17
    between_the_passes = 4 * b * chunks * n * e + 2 * b * tokens * e  # stored states, and the cotangent in bfloat16
    assert reports["spread"]["temp"] <= 1.05 * (partial_sums(b, tokens, e) + between_the_passes)


@pytest.mark.slow
def test_the_default_has_no_kernel_of_triton_and_starts_few(reports):
    assert reports["spread by default"]["kernels"] == 0
    assert reports["spread by default"]["collectives"] == ["all-reduce"]
    for way, ratio in (("forward", 10), ("backward", 10)):
        assert ratio * reports[f"associative 64 {way}"]["kernels"] < reports[f"loop 16 {way}"]["kernels"]
        assert reports[f"associative 64 {way}"]["temp"] < 2 * reports[f"loop 16 {way}"]["temp"]
