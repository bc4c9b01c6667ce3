"""Runs the tests of the Triton kernels (tests/kernels/triton) where the kernels are interpreted."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
AT_ONCE = 2


@pytest.fixture(scope="module")
def runs():
    """One process per file of tests, some at once: path -> its end, to be waited for."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {path: pool.submit(run, path) for path in FILES}


def run(path):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(1200)  # a busy machine; each test in there has the usual limit
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(runs, path):
    done = runs[path].result()
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_tests_to_run():
    assert FILES
