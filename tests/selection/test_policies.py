import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.importance.scores import LayerStatistics
from floe.selection.policies import POLICIES, PolicyInputs
from floe.selection.policies.__main__ import with_tables
from floe.selection.policies.baselines import even_layers
from floe.selection.policies.registry import best_window, by_position, known_statistics
from floe.selection.ranking import rank_layers


def inputs(total=30, count=8, seed=41, statistics=None, **scores):
    units = np.arange(total)[:, None] % 5.0 + np.ones((total, 3))
    fields = {"adapter_fisher": np.arange(total) % 7.0, "probe_fisher": None}
    fields |= {"head_fisher": units, "neuron_fisher": units, "head_taylor": units}
    gates = np.random.default_rng(total).normal(size=(6, total, 3)).astype(np.float32)
    fields |= {"neuron_taylor": units, "gate_gradient": gates} | scores
    measured = None if statistics is None else LayerStatistics(total, statistics)
    mask_scores = np.linspace(1, 0, total)
    return PolicyInputs(SimpleNamespace(**fields), count, total, seed, mask_scores, measured)


def ranking(name, **options):
    return rank_layers(POLICIES[name](inputs(**options))).tolist()


def chosen(name, count=8, **options):
    return sorted(ranking(name, count=count, **options)[:count])


def everything(total):
    rng = np.random.default_rng(total)
    sizes = {"L": total, "L + 1": total + 1, "P": 3}
    known = known_statistics().items()
    return {name: rng.random([sizes[size] for size in one.sizes]) for name, one in known}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_ranks_every_layer(name):
    for total, count in ((1, 1), (5, 2), (30, 30)):
        measured = everything(total)
        order = ranking(
            name, total=total, count=count, probe_fisher=np.ones(total), statistics=measured
        )
        assert sorted(order) == list(range(total))
        assert POLICIES[name].score


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


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
def test_layer_sums_of_units_up_and_down(kind):
    units = {
        f"head_{kind}": np.array([[1.0, 1.0], [0.0, 9.0], [2.0, 0.0], [0.0, 9.0]]),
        f"neuron_{kind}": np.array([[9.0], [0.0], [1.0], [0.0]]),  # sums 11, 9, 3, 9
    }
    assert POLICIES[f"{kind}_high"](inputs(total=4, **units)).tolist() == [11, 9, 3, 9]
    assert ranking(f"{kind}_high", total=4, **units) == [0, 1, 3, 2]
    assert ranking(f"{kind}_low", total=4, **units) == [2, 1, 3, 0]


def test_the_best_segment_comes_first_and_in_order():
    fisher = np.array([5.0, 0.0, 3.0, 4.0, 0.0, 6.0])
    # windows of 2: 5 3 7 4 6; of 3: 8 7 7 10
    found = ranking("segment", total=6, count=2, adapter_fisher=fisher)
    assert found == [2, 3, 4, 5, 0, 1]
    assert ranking("segment", total=6, count=3, adapter_fisher=fisher)[:3] == [3, 4, 5]
    flat = np.ones(5)  # equal windows: the lowest start
    assert ranking("segment", total=5, count=2, adapter_fisher=flat) == [0, 1, 2, 3, 4]
    for equal in ([0.1, 0.2, 0.3, 0, 0.3, 0.2, 0.1], [0.3, 0.2, 0.1, 0, 0.1, 0.2, 0.3]):
        found = ranking("segment", total=7, count=3, adapter_fisher=np.array(equal))
        assert found[:3] == [0, 1, 2]  # equal whatever order the scores are added in
    with pytest.raises(ValueError, match=r"adapter_fisher\[0\] must be finite"):
        ranking("segment", total=2, count=1, adapter_fisher=np.array([np.inf, 0]))


@settings(deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.randoms())
def test_a_window_ranking_starts_with_a_best_window(sizes, random):
    total, count = sizes
    windows = [random.randint(-3, 3) for _ in range(total - count + 1)]
    order = rank_layers(best_window(windows, count)).tolist()
    start = windows.index(max(windows))
    assert order[:count] == list(range(start, start + count))
    assert sorted(order) == list(range(total))


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_positions_reproduce_an_order(order):
    assert rank_layers(by_position(order)).tolist() == list(order)


PLAIN = {
    "gradient_norm": "gradient_norm",
    "lamp": "lamp_kept",
    "shapley": "shapley",
    "error_propagation": "error_growth",
    "coarse_to_fine": "zeroth_order",
}


@pytest.mark.parametrize(("policy", "statistic"), PLAIN.items())
def test_larger_statistics_come_first(policy, statistic):
    values = np.array([0.1, 0.5, 0.3, 0.5])
    assert ranking(policy, total=4, statistics={statistic: values}) == [1, 3, 2, 0]


def test_the_layer_nearest_to_the_full_model_comes_first():
    kl = np.array([0.1, 0.5, 0.3, 0.1])
    assert ranking("kl_guided", total=4, statistics={"kl_to_full": kl}) == [0, 3, 2, 1]


def test_the_layer_that_joined_first_comes_first():
    places = np.array([2.0, 4.0, 1.0, 3.0])
    found = ranking("forward_selection", total=4, statistics={"forward_place": places})
    assert found == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("policy", "statistic"), [("spectrum", "signal_share"), ("eva", "explained_variance")]
)
def test_projections_are_averaged(policy, statistic):
    shares = np.array([[0.2, 0.2], [0.0, 0.9], [0.3, 0.2]])
    assert ranking(policy, total=3, statistics={statistic: shares}) == [1, 2, 0]


def test_angles_between_neighbours_and_over_blocks():
    angles = np.zeros((5, 5))
    angles[0, 1], angles[1, 2], angles[2, 3], angles[3, 4] = 0.2, 0.1, 0.4, 0.2
    angles[0, 2], angles[1, 3], angles[2, 4] = 0.1, 0.6, 0.3
    angles[4, 0] = 0.9  # below the diagonal: never read
    of = {"angular_last": angles, "angular_all": angles}
    assert ranking("angular", total=4, statistics=of) == [2, 0, 3, 1]
    assert ranking("angular_all", total=4, statistics=of) == [2, 0, 3, 1]
    assert ranking("angular_block", total=4, count=2, statistics=of) == [1, 2, 3, 0]


def test_a_gates_fisher_information_is_that_of_its_projections_sum():
    gradient = np.random.default_rng(1).normal(size=(20, 6, 2))
    found = POLICIES["gate_fisher_diagonal"](inputs(total=6, gate_gradient=gradient))
    assert found == pytest.approx((gradient.sum(axis=2) ** 2).sum(axis=0))


def test_gates_must_have_been_measured():
    policy = POLICIES["gate_fisher_diagonal"]
    message = r"needs scores.gate_gradient, got None; score the model again"
    with pytest.raises(ValueError, match=message):
        policy(inputs(total=4, gate_gradient=None))
    with pytest.raises(ValueError, match=r"gate_gradient must be \[S, 4, P\] with S > 0"):
        policy(inputs(total=4, gate_gradient=np.ones((3, 5, 1))))


def test_coupled_layers_are_discounted():
    coupling = np.array([[1.0, 0.9, 0.0, 0.5], [0.9, 1, 0, 0.1], [0, 0, 1, 0], [0.5, 0.1, 0, 1]])
    of = {"residual_norm": np.array([4.0, 3.0, 1.0, 2.0]), "coupling": coupling}
    # 16 9 1 4 -> 0; then 0.9, 1, 2 -> 3; then 0.9, 1 -> 2
    assert ranking("layer_card", total=4, statistics=of) == [0, 3, 2, 1]
    # without coupling the norms alone decide
    of["coupling"] = np.eye(4)
    assert ranking("layer_card", total=4, statistics=of) == [0, 1, 3, 2]


def test_needs_name_what_policies_read():
    for name in POLICIES:
        needed = POLICIES[name].statistics
        assert set(needed) <= set(known_statistics())
        measured = {key: value for key, value in everything(4).items() if key in needed}
        ranking(name, total=4, count=2, probe_fisher=np.ones(4), statistics=measured)


@pytest.mark.parametrize("name", sorted(name for name in POLICIES if POLICIES[name].statistics))
def test_missing_statistics_say_how_to_measure_them(name):
    rule = rf"policy '{name}' needs the statistic .*measure_statistics\(model, batches, \['{name}'"
    with pytest.raises(ValueError, match=rule):
        ranking(name)
    with pytest.raises(ValueError, match=rule):
        ranking(name, total=3, statistics={})
    other = LayerStatistics(4, everything(4))
    with pytest.raises(ValueError, match="must be of the scored model's 3 layers, got 4"):
        POLICIES[name](PolicyInputs(None, 1, 3, 0, np.zeros(3), other))


def test_random_follows_its_seed():
    assert ranking("random") == ranking("random")
    assert ranking("random") == np.random.default_rng(41).permutation(30).tolist()
    assert ranking("random") != ranking("random", seed=42)
    # A layer is in the choice as often as every other: 8 of 30 over many seeds.
    hits = np.zeros(30)
    for seed in range(600):
        hits[chosen("random", seed=seed)] += 1
    assert abs(hits / 600 - 8 / 30).max() < 5 * np.sqrt(8 / 30 * 22 / 30 / 600)


def test_the_document_is_that_of_the_policies():
    text = (Path(__file__).parents[2] / "docs" / "POLICIES.md").read_text(encoding="utf-8")
    assert text == with_tables(text), "python -m floe.selection.policies docs/POLICIES.md"
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    named = re.findall(r"`(\w+)`", rows)
    assert sorted(named) == sorted([*POLICIES, *known_statistics(), "lisa", "alast"])
