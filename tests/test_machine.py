"""The facts of the machine, and threads that share its cores unless the user says how they wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from floe.machine import WAITING, environment

ROOT = Path(__file__).parents[1]
SAY = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
CLI = f"""
import sys
from floe.cli import main
sys.argv = ["floe", "--help"]
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
{SAY}"""
BENCHMARK = f"import benchmarks, sys; assert 'torch' not in sys.modules\n{SAY}"


def said_by(script, **more):
    environment = {k: v for k, v in os.environ.items() if k not in WAITING} | more
    command = [sys.executable, "-c", script]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    return ended.stdout.split()[-2:]


@pytest.mark.parametrize("script", [CLI, BENCHMARK], ids=["command", "benchmark"])
def test_threads_spin_briefly(script):
    assert said_by(script) == ["1000", "None"]


@pytest.mark.parametrize("script", [CLI, BENCHMARK], ids=["command", "benchmark"])
def test_what_the_user_set_is_kept(script):
    assert said_by(script, OMP_WAIT_POLICY="active") == ["None", "active"]
    assert said_by(script, GOMP_SPINCOUNT="7") == ["7", "None"]


def test_the_environment_names_versions_without_loading_them():
    script = (
        "import json, sys; from floe.machine import environment as e; found = e()\n"
        "assert 'torch' not in sys.modules; print(json.dumps(found))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    found = json.loads(printed)
    assert found == json.loads(json.dumps(environment()))
    assert {"python", "platform", "cpu", "threads", "torch", "peft", "floe", "commit"} <= set(found)
    assert found["torch"]


def test_the_environment_names_the_commit_of_the_source_tree():
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository around the tests")
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert environment()["commit"] == head
