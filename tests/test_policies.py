from types import SimpleNamespace

import numpy as np
import pytest

from floe.selection.policies import POLICIES, Situation, even_layers
from floe.selection.ranking import rank_layers


def situation(total=30, count=8, seed=41, **scores):
    fields = {"adapter_fisher": np.arange(total) % 7.0, "probe_fisher": None} | scores
    return Situation(SimpleNamespace(**fields), count, total, seed, np.linspace(1, 0, total))


def ranking(name, **options):
    return rank_layers(POLICIES[name](situation(**options))).tolist()


def chosen(name, count=8, **options):
    return sorted(ranking(name, count=count, **options)[:count])


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_ranks_every_layer(name):
    for total, count in ((1, 1), (5, 2), (30, 30)):
        order = ranking(name, total=total, count=count, probe_fisher=np.ones(total))
        assert sorted(order) == list(range(total))
        assert POLICIES[name].__doc__


def test_baselines_choose_what_they_say():
    assert chosen("even") == [0, 4, 8, 12, 17, 21, 25, 29]
    assert chosen("even", count=1) == [14]
    assert ranking("even", total=6, count=2) == [0, 5, 1, 2, 3, 4]
    assert chosen("first") == list(range(8))
    assert ranking("first") == list(range(30))
    assert chosen("last") == list(range(22, 30))
    assert ranking("last") == list(range(29, -1, -1))
    assert chosen("middle") == list(range(11, 19))
    assert ranking("middle", total=5) == [2, 1, 3, 0, 4]
    assert ranking("masks") == list(range(30))


def test_even_layers_are_distinct_and_end_at_both_ends():
    for total in range(2, 40):
        for count in range(2, total + 1):
            layers = even_layers(count, total)
            assert len(set(layers)) == count
            assert (layers[0], layers[-1]) == (0, total - 1)
            gaps = np.diff(layers)
            assert gaps.max() - gaps.min() <= 1


def test_sensitive_adapters_come_first():
    fisher = np.array([1.0, 5.0, 3.0, 5.0])
    assert ranking("adapter_fisher", total=4, adapter_fisher=fisher) == [1, 3, 2, 0]
    assert ranking("probe", total=4, probe_fisher=fisher) == [1, 3, 2, 0]
    with pytest.raises(ValueError, match=r"needs scores.probe_fisher, got None.*probe=True"):
        ranking("probe")
    with pytest.raises(ValueError, match=r"adapter_fisher\[1\] must be finite, got nan"):
        ranking("adapter_fisher", total=3, adapter_fisher=np.array([1, np.nan, 2]))


def test_random_follows_its_seed():
    assert ranking("random") == ranking("random")
    assert ranking("random") == np.random.default_rng(41).permutation(30).tolist()
    assert ranking("random") != ranking("random", seed=42)
    # A layer is in the choice as often as every other: 8 of 30 over many seeds.
    hits = np.zeros(30)
    for seed in range(600):
        hits[chosen("random", seed=seed)] += 1
    assert abs(hits / 600 - 8 / 30).max() < 5 * np.sqrt(8 / 30 * 22 / 30 / 600)
