"""A policy is what it registers: one is added here, at run time, and a run trains with it."""

import json

import numpy as np
import pytest
from helpers.tiny_run import write_inputs

import floe
from floe.config_file import parse_config
from floe.decoder_blocks import find_blocks, linear_at
from floe.selection.policies import POLICIES
from floe.selection.policies.__main__ import with_tables
from floe.selection.policies.registry import Measure, Statistic, policy


def weight_norms(model):
    """What the policy measures: the norm of each block's query projection, [L]."""
    weights = [linear_at(model, block.linears["q_proj"]).weight for block in find_blocks(model)]
    return np.array([float(weight.double().norm()) for weight in weights])


@pytest.fixture
def heavy():
    """A policy that takes the layers of the largest query projection."""
    measure = Measure(weight_norms, {"query_norm": Statistic("L", "norm of the query projection")})

    @policy(measure=measure, cheap=True, score="the norm of q_proj", assumed="large is good")
    def heavy(inputs):
        return inputs.statistic("query_norm")

    yield "heavy"
    del POLICIES["heavy"]


def test_a_policy_added_at_run_time_decides_what_is_trained(heavy, tmp_path):
    config = write_inputs(tmp_path) | {"baselines": [{"name": "other", "policy": heavy}]}
    config |= {"profile": {"steps": 0}, "eval": {"accuracy": "none"}}
    config["select"] |= {"policy": heavy, "tune": False}
    config["baselines"][0] |= {"pick": "bottom"}
    run = floe.run(parse_config(config)).folder
    with np.load(run / "statistics/query_norm/statistics.npz") as file:
        norms = file["query_norm"]
    order = np.argsort(-norms)
    for arm, layers in (("main", order[:2]), ("other", order[2:])):
        metrics = json.loads((run / f"train/{arm}/metrics.json").read_text())
        assert (metrics["policy"], metrics["layers"]) == (heavy, sorted(layers.tolist()))
    assert (run / "report.html").is_file()


def test_it_is_known_wherever_policies_are_named(heavy):
    assert "| `heavy` |" in with_tables("<!-- statistics -->\n<!-- end -->")
    data = {"model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}}
    assert parse_config(data | {"select": {"policy": heavy}}).select.policy == heavy
    with pytest.raises(ValueError, match=r"Input should be 'random'.*'heavy'"):
        parse_config(data | {"select": {"policy": "light"}})
    with pytest.raises(ValueError, match="a policy named 'heavy' exists already"):
        policy("heavy", score="")(len)
