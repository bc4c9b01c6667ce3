from types import SimpleNamespace

import numpy as np
import pytest

from floe.selection.allocate import Saturating, option_costs
from floe.selection.modules import module_scores
from floe.selection.placement import Placement, place_modules, place_sizes

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
    assert Placement.read({**placement.document(), "policy": "even"}) == placement


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
    found = place_modules([[0, 5, 1], [9, 0, 0]], np.full((2, 3), 10), 20, NAMES)
    assert found == Placement((0, 1), modules={0: ("up_proj",), 1: ("gate_proj",)})
    with pytest.raises(ValueError, match="budget must pay for a projection of score above 0"):
        place_modules([[1.0]], [[10]], 9, ("up_proj",))


def test_sizes_spend_the_budget_where_it_is_worth_most():
    options = [(0, 0), (2, 2), (4, 2), (8, 4)]
    costs = np.array([option_costs(SHAPES, options)] * 3)
    budget = int(costs[0, 3] + costs[0, 1])
    found = place_sizes([100.0, 0.0, 1.0], options, costs, budget, Saturating(16.0))
    assert found.sizes[0] == (8, 4)  # the layer that gains most
    assert 1 not in found.sizes  # gains nothing
    spent = sum(costs[k, options.index(size)] for k, size in found.sizes.items())
    assert spent <= budget
    assert found.layers == tuple(sorted(found.sizes))
    with pytest.raises(ValueError, match="budget must pay for the adapter of a layer"):
        place_sizes([1.0], options, costs[:1], int(costs[0, 1]) - 1, Saturating(16.0))


def test_large_budgets_keep_a_small_table():
    options = [(0, 0), *((rank, 4) for rank in range(2, 33, 2))]
    dimensions = [(4096, 14336), (4096, 14336), (14336, 4097)]  # an odd size: the divisor is small
    costs = np.array([option_costs(dimensions, options)] * 80)
    budget = int(costs[:20, 4].sum())
    found = place_sizes(np.arange(1.0, 81), options, costs, budget, Saturating(16.0))
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
