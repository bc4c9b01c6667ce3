import numpy as np
import pytest
import torch
from helpers.importance_models import adapted, assert_untouched, batches, plain, snapshot

from floe.importance.layer_statistics import measure_statistics
from floe.importance.layer_statistics.weights import lamp_kept
from floe.importance.score import score
from floe.importance.scores import LayerStatistics
from floe.selection.policies import POLICIES
from floe.selection.policies.registry import known_statistics
from floe.selection.select import select

NEEDS = {name: policy.statistics for name, policy in POLICIES.items() if policy.statistics}


@pytest.fixture(scope="module")
def measured():
    return measure_statistics(adapted(), batches(size=2), list(POLICIES), rank=3, sets=6)


def test_every_statistic_is_measured_once_and_described(measured):
    assert set(measured.values) == set(known_statistics())
    assert measured.layers == 3
    assert measured.meta["rows"] == 5
    assert measured.meta["tokens"] == 32
    assert measured.meta["policies"] == list(POLICIES)
    assert measured.meta["eva_projections"] == ["gate_proj", "up_proj", "down_proj"]
    assert measured.values["explained_variance"].shape == (3, 3)
    assert measured.values["signal_share"].shape == (3, 7)


@pytest.mark.parametrize("policy", sorted(NEEDS))
def test_a_policy_needs_only_what_is_measured_for_it(policy, measured):
    model = adapted()
    before = snapshot(model)
    seen = set()
    own = measure_statistics(
        model, batches(size=2), [policy], rank=3, sets=6, progress=lambda *step: seen.add(step[2])
    )
    assert_untouched(model, before)
    assert set(own.values) == set(NEEDS[policy])
    assert len(seen) == 1
    for name, values in own.values.items():
        assert np.array_equal(values, measured.values[name])  # alone or with others: the same
    options = {"layers": 2, "policy": policy, "tune": False}
    scores = SCORES.get("scores") or SCORES.setdefault("scores", score(adapted(), batches()))
    chosen = select(scores, statistics=own, **options)
    assert len(chosen.layers) == 2
    assert sorted(chosen.ranking) == [0, 1, 2]
    assert np.isfinite(chosen.layer_scores).all()
    with pytest.raises(ValueError, match=rf"policy '{policy}' needs the statistic"):
        select(scores, **options)


SCORES: dict = {}


def test_options_reach_their_measures(tmp_path):
    def of(name, **options):
        return measure_statistics(adapted(), batches(size=2), [name], **options).values[
            NEEDS[name][0]
        ]

    assert np.array_equal(of("lamp", keep=0.2), lamp_kept(plain(), 0.2))
    assert (of("eva", rank=1) < of("eva", rank=2)).all()
    for name in ("gradient_norm", "error_propagation", "coarse_to_fine"):
        assert np.array_equal(of(name, seed=1), of(name, seed=1))
        assert not np.array_equal(of(name, seed=1), of(name, seed=2))
    one, two = of("coarse_to_fine", probes=1), of("coarse_to_fine", probes=2)
    assert not np.allclose(one, two, rtol=0.01)
    with pytest.raises(ValueError, match="sets must be an even number >= 2 for 3 layers, got 3"):
        of("shapley", sets=3)


def test_a_plain_model_and_a_generator_of_batches(tmp_path):
    names = ["angular", "eva", "lamp", "random"]
    found = measure_statistics(plain(dtype=torch.bfloat16), iter(batches(size=2)), names)
    assert set(found.values) == {"angular_last", "explained_variance", "lamp_kept"}
    assert found.values["explained_variance"].shape == (3, 7)
    found.save(tmp_path / "s.npz")
    assert LayerStatistics.load(tmp_path / "s.npz").meta == found.meta
    assert measure_statistics(plain(), batches(), ["even"]).values == {}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"names must be policies of .*got \['best'\]"):
        measure_statistics(plain(), batches(), ["eva", "best"])
    with pytest.raises(ValueError, match="batches must hold at least one row, got none"):
        measure_statistics(plain(), [], ["eva"])
    for name in ("gradient_norm", "kl_guided", "shapley"):
        with pytest.raises(ValueError, match=r"must carry .*got none"):
            measure_statistics(plain(), batches(), [name])
