"""What other programs make of floe, and floe of their models: see peers.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PEERS = Path(sys.prefix) / "peers"


@pytest.fixture(scope="module")
def found():
    if not PEERS.is_dir():
        pytest.skip(f"torchao, bitsandbytes and trl are not in {PEERS}: make test installs them")
    path = os.pathsep.join([str(PEERS), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers/peers.py"), "torchao", "bitsandbytes", "trl"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND ")[2])


@pytest.mark.parametrize("what", ["torchao", "bitsandbytes"])
def test_a_quantised_base_is_trained_scored_selected_saved_and_loaded(found, what):
    result = found[what]
    assert result["logits"] < 1e-5
    assert result["gradients"] < 1e-5
    assert len(result["layers"]) == 2
    assert not result["tuned"]
    assert result["loaded"]


def test_trl_trains_from_an_adapter_and_adds_tokens(found):
    result = found["trl"]
    assert result["losses"] == pytest.approx([0.6931472] * 2, abs=1e-6)  # the reference is a copy
    assert result["tokens"]
    assert result["modules"] == ["lm_head"]
    assert result["adapted"] == ["down_proj", "gate_proj", "up_proj"]
