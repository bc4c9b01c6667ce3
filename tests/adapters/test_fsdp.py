"""FSDP2 shards an adapted model's parameters; the op sees them whole and gives their gradients."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers.sharded import TOKENS, adapted, gradients, step, wide_base
from peft import get_peft_model_state_dict

TESTS = Path(__file__).parents[1]


def test_two_sharded_workers_get_what_one_process_gets(tmp_path):
    out = tmp_path / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [*command, str(TESTS / "helpers/sharded.py"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (sharded, stepped), whole = torch.load(out), gradients(adapted(), TOKENS)
    assert sharded.keys() == whole.keys()
    assert all("floe_" in name for name in whole)
    for name, expected in whole.items():
        torch.testing.assert_close(sharded[name], expected, rtol=1e-4, atol=1e-7)
    model = wide_base()
    before = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    step(model, TOKENS)
    after = get_peft_model_state_dict(model)
    assert stepped.keys() == after.keys()
    for name, expected in after.items():
        change = (expected - before[name]).norm()
        assert change > 0
        assert (stepped[name] - expected).norm() < 1e-4 * change, name
