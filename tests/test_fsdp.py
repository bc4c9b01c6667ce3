"""FSDP2 shards an adapted model's parameters; the op sees them whole and gives their gradients."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from sharded import TOKENS, adapted, gradients

TESTS = Path(__file__).parent


def test_two_sharded_workers_get_the_gradients_of_one_process(tmp_path):
    out = tmp_path / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [*command, str(TESTS / "sharded.py"), str(out)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sharded, whole = torch.load(out), gradients(adapted(), TOKENS)
    assert sharded.keys() == whole.keys()
    assert all("floe_" in name for name in whole)
    for name, expected in whole.items():
        torch.testing.assert_close(sharded[name], expected, rtol=1e-4, atol=1e-7)
