"""What importing loads: nothing heavy before it is needed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import floe

ROOT = Path(__file__).parents[1]
VERSION = {"version": floe.__version__}
HEAVY = {"torch", "transformers", "peft", "datasets", "optuna", "triton"}


def loaded_by(*modules):
    script = (
        f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_floe_itself_loads_next_to_nothing():
    assert not loaded_by("floe") & (HEAVY | {"numpy", "pydantic", "yaml", "matplotlib"})


def test_the_command_line_and_a_run_s_files_load_no_torch():
    files = ("config_file", "machine", "pipeline.run_folder", "errors", "cli")
    assert not loaded_by(*(f"floe.{name}" for name in files)) & HEAVY


def test_selection_and_the_report_run_without_torch():
    found = loaded_by("floe.selection", "floe.importance.scores", "floe.report")
    assert not found & HEAVY
    assert "numpy" in found


def test_the_kernels_stand_alone():
    found = loaded_by("floe_triton")
    assert "torch" in found
    assert not found & {"floe", "transformers", "peft"}


@pytest.mark.parametrize("name", floe.__all__)
def test_every_public_name_exists(name):
    assert getattr(floe, name) is not None
    assert name in dir(floe)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'floe' has no attribute 'magic'"):
        floe.magic  # noqa: B018


def test_both_distributions_are_of_one_version():
    """floe's own is read from ``floe/__init__.py``; the kernels' is built without that file."""
    for folder, names in ((".", {"dynamic": ["version"]}), ("triton_kernels", VERSION)):
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        assert names.items() <= project.items()
