import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.artifacts.schema import document, parse
from floe.selection.placement import Placement, Saturating, module_scores, option_costs

NAMES = ("gate_proj", "up_proj", "down_proj")
SHAPES = [(8, 16), (8, 16), (16, 8)]  # of one layer's projections


@pytest.mark.parametrize(
    "placement",
    [
        Placement((0, 3)),
        Placement((1, 2), modules={1: ("up_proj",), 2: NAMES}),
        Placement((1, 2), sizes={1: (4, 2), 2: (16, 3)}),
    ],
)
def test_documents_are_read_back(placement):
    values = json.loads(json.dumps({**document(placement), "policy": "even"}))
    assert parse(Placement, values, "placement") == placement


def test_it_becomes_an_adapter_of_these_projections_and_sizes():
    from floe.adapters import FloeConfig

    config = FloeConfig(**Placement((1, 2), modules={1: ("up_proj",), 2: NAMES}).patterns)
    assert config.layer_modules == {"1": ["up_proj"], "2": sorted(NAMES)}
    assert config.layers == [1, 2]
    config = FloeConfig(**Placement((0, 2), sizes={0: (4, 2), 2: (16, 3)}).patterns)
    assert (config.rank_pattern, config.expert_pattern) == ({"0": 4, "2": 16}, {"0": 2, "2": 3})


def test_layers_of_every_part_agree():
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="layers must be ascending and at least one"):
            Placement(layers)
    with pytest.raises(ValueError, match=r"modules must be of the layers \(0, 1\), got \[0\]"):
        Placement((0, 1), modules={0: NAMES})
    with pytest.raises(ValueError, match=r"sizes must be of the layers \(0,\), got \[1\]"):
        Placement((0,), sizes={1: (2, 2)})


def test_projections_that_fit():
    found = Placement.of_modules([[0, 5, 1], [9, 0, 0]], np.full((2, 3), 10), 20, NAMES)
    assert found == Placement((0, 1), modules={0: ("up_proj",), 1: ("gate_proj",)})
    with pytest.raises(ValueError, match="budget must pay for a projection of score above 0"):
        Placement.of_modules([[1.0]], [[10]], 9, ("up_proj",))


def test_sizes_spend_the_budget_where_it_is_worth_most():
    options = [(0, 0), (2, 2), (4, 2), (8, 4)]
    costs = np.array([option_costs(SHAPES, options)] * 3)
    budget = int(costs[0, 3] + costs[0, 1])
    found = Placement.of_sizes([100.0, 0.0, 1.0], options, costs, budget, Saturating(16.0))
    assert found.sizes[0] == (8, 4)  # the layer that gains most
    assert 1 not in found.sizes  # gains nothing
    spent = sum(costs[k, options.index(size)] for k, size in found.sizes.items())
    assert spent <= budget
    assert found.layers == tuple(sorted(found.sizes))
    with pytest.raises(ValueError, match="budget must pay for the adapter of a layer"):
        Placement.of_sizes([1.0], options, costs[:1], int(costs[0, 1]) - 1, Saturating(16.0))


def test_large_budgets_keep_a_small_table():
    options = [(0, 0), *((rank, 4) for rank in range(2, 33, 2))]
    dimensions = [(4096, 14336), (4096, 14336), (14336, 4097)]  # an odd size: the divisor is small
    costs = np.array([option_costs(dimensions, options)] * 80)
    budget = int(costs[:20, 4].sum())
    found = Placement.of_sizes(np.arange(1.0, 81), options, costs, budget, Saturating(16.0))
    spent = sum(costs[k, options.index(size)] for k, size in found.sizes.items())
    assert 0.98 * budget < spent <= budget


def test_scores_of_projections():
    gates = np.arange(12.0).reshape(2, 2, 3)
    scores = SimpleNamespace(module_fisher=np.ones((2, 3)), gate_gradient=gates)
    assert np.array_equal(module_scores(scores, "adapter_fisher"), np.ones((2, 3)))
    expected = gates[0] ** 2 + gates[1] ** 2
    assert np.array_equal(module_scores(scores, "gate_fisher_diagonal"), expected)
    with pytest.raises(ValueError, match=r"policy must be one of .*got 'even'"):
        module_scores(scores, "even")
    empty = SimpleNamespace(module_fisher=None, gate_gradient=None)
    for policy in ("adapter_fisher", "gate_fisher_diagonal"):
        with pytest.raises(ValueError, match="needs scores of single projections, got none"):
            module_scores(empty, policy)


def test_a_choice_by_hand():
    scores = [[5, 1, 1], [0, 4, 3]]
    found = Placement.of_modules(scores, [[2, 1, 1], [1, 2, 3]], 5, NAMES)  # score 10, all of 5
    assert found.modules == {0: ("gate_proj", "up_proj"), 1: ("up_proj",)}


def test_nothing_and_everything():
    scores, sizes = np.arange(1.0, 7).reshape(2, 3), np.ones((2, 3), int)
    assert Placement.of_modules(scores, sizes, 6, NAMES).modules == {0: NAMES, 1: NAMES}
    for nothing in ((scores, sizes, 0), (np.zeros((2, 3)), sizes, 6)):
        with pytest.raises(ValueError, match="budget must pay for a projection of score above 0"):
            Placement.of_modules(*nothing, NAMES)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_choice_within_the_budget_scores_more(data):
    layers, units = data.draw(st.integers(1, 4)), 3
    entry = st.lists(st.integers(0, 6), min_size=layers * units, max_size=layers * units)
    scores = np.array(data.draw(entry), float).reshape(layers, units)
    sizes = np.array(data.draw(entry)).reshape(layers, units)
    budget = data.draw(st.integers(0, int(sizes.sum()) + 1))
    choices = (np.arange(2**scores.size)[:, None] >> np.arange(scores.size)) & 1
    values, costs = choices @ scores.ravel(), choices @ sizes.ravel()
    best = values[costs <= budget].max()
    if best == 0:
        with pytest.raises(ValueError, match="budget must pay"):
            Placement.of_modules(scores, sizes, budget, NAMES)
        return
    found = Placement.of_modules(scores, sizes, budget, NAMES).modules
    pairs = [(layer, NAMES.index(name)) for layer, names in found.items() for name in names]
    assert sum(scores[pair] for pair in pairs) == best
    assert sum(sizes[pair] for pair in pairs) <= budget
    assert all(scores[pair] > 0 for pair in pairs)


def test_bad_input():
    with pytest.raises(ValueError, match=r"must be \[L, P\]"):
        Placement.of_modules(np.ones((2, 3)), np.ones((2, 2), int), 1, NAMES)
    with pytest.raises(ValueError, match="names P different ones"):
        Placement.of_modules(np.ones((2, 2)), np.ones((2, 2), int), 1, ("up", "up"))
    with pytest.raises(ValueError, match=r"value\[0\] must be a finite number >= 0"):
        Placement.of_modules([[-1.0]], [[1]], 1, ("up",))
    with pytest.raises(TypeError, match="parameters must be integers, got dtype float64"):
        Placement.of_modules([[1.0]], [[1.5]], 1, ("up",))
    with pytest.raises(ValueError, match=r"budget must be in \[0, 2\*\*63\), got -1"):
        Placement.of_modules([[1.0]], [[1]], -1, ("up",))


def test_budgets_beyond_the_solvers_digits():
    most = 2**38
    whole = Placement.of_modules(np.ones((1, 3)), np.full((1, 3), most), 10**18, NAMES[:3])
    assert whole.modules == {0: NAMES}
    with pytest.raises(ValueError, match=r"budget must be below 2\*\*39 parameters"):
        Placement.of_modules(np.ones((1, 3)), np.full((1, 3), most), 3 * most - 1, NAMES[:3])
    with pytest.raises(ValueError, match=r"parameters must be in \[0, 2\*\*39\), got 1 to"):
        Placement.of_modules([[1.0, 1.0]], np.array([[1, 2**63]], np.uint64), 1, NAMES[:2])
