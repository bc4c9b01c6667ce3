import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.selection.masks import Units, determine, refine_masks
from floe.selection.presets import PRESETS, Preset, preset_of
from floe.selection.solvers import solve_mask, solve_two_class, solve_two_class_literal

PAIRS = ("same_layer_cross", "same_layer", "all")


def one_layer(head_value, head_cost, neuron_value, neuron_cost):
    arrays = (head_value, neuron_value, head_cost, neuron_cost)
    return Units(*(np.array([a], dtype=float).reshape(1, -1) for a in arrays))


def bits(mask):
    return "".join("1" if kept else "0" for kept in np.ravel(mask))


def refine(units, budget, heads, neurons, **options):
    masks = (np.array([[bit == "1" for bit in text]]).reshape(1, -1) for text in (heads, neurons))
    return refine_masks(units, budget, *masks, **options)


def test_a_swap_repairs_what_greedy_missed():
    units = one_layer([], [], [60, 100, 120], [10, 20, 30])
    found = refine(units, 50, "", "110", pairs="same_layer")
    assert (bits(found.neuron_mask), found.value, found.cost) == ("011", 220, 50)
    assert (found.repairs, found.adds, found.swaps, found.converged) == (0, 0, 1, True)
    stuck = refine(units, 50, "", "110", pairs="same_layer_cross")  # there is no head to swap with
    assert bits(stuck.neuron_mask) == "110"


def test_swaps_can_get_stuck():
    found = refine(one_layer([], [], [10, 6, 6], [10, 5, 5]), 10, "", "100", pairs="all")
    assert (bits(found.neuron_mask), found.swaps, found.adds) == ("100", 0, 0)
    assert found.converged


def test_masks_determined_at_mean_costs_are_repaired():
    units = one_layer([8, 7], [6, 2], [5, 4, 3], [1, 3, 2])
    start = solve_two_class(units.head_value[0], units.neuron_value[0], 4, 2, 8)
    assert (bits(start.mask), start.cost) == ("10110", 8)  # which really cost 10
    found = refine(units, 8, "10", "110", pairs="all")
    assert found.repairs == 1
    assert found.cost <= 8
    assert found.value == 19


def test_repair_masks_the_least_ratio_then_the_dearer_then_the_later():
    units = one_layer([], [], [4, 1, 2, 2, 0], [1, 1, 2, 2, 0])
    found = refine(units, 4, "", "11111", max_moves=0)
    assert (bits(found.neuron_mask), found.repairs, found.converged) == ("11101", 1, False)
    found = refine(units, 3, "", "11111", max_moves=0)
    assert (bits(found.neuron_mask), found.repairs) == ("11001", 2)
    found = refine(units, 1, "", "11111", max_moves=0)
    assert (bits(found.neuron_mask), found.repairs) == ("10001", 3)
    found = refine(units, 0, "", "11111")
    assert bits(found.neuron_mask) == "00001"


def test_printed_refinement_drifts_from_the_budget():
    units = one_layer([5, 6, 7, 8], [4] * 4, [1, 2, 3, 4, 5, 6], [1] * 6)
    start = solve_two_class_literal(units.head_value[0], units.neuron_value[0], 4, 1, 8)
    assert (bits(start.head_mask), bits(start.neuron_mask)) == ("0011", "111111")
    assert (start.masked_value, start.masked_cost) == (11, 8)
    printed = refine(units, 8, "0011", "111111", literal=True)
    assert (bits(printed.head_mask), bits(printed.neuron_mask)) == ("1111", "001111")
    assert (printed.masked_value, printed.masked_cost, printed.swaps) == (3, 2, 2)
    once = refine(units, 8, "0011", "111111", literal=True, max_moves=1)
    assert (bits(once.head_mask), bits(once.neuron_mask)) == ("0111", "011111")
    retained = refine(units, 14, "0011", "111111")
    assert bits(retained.head_mask) == "0011"
    assert (retained.value, retained.adds, retained.swaps) == (36, 0, 0)


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 2))
    heads, neurons = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    number = st.integers(0, 5)

    def array(units):
        flat = draw(st.lists(number, min_size=layers * units, max_size=layers * units))
        return np.array(flat, dtype=float).reshape(layers, units)

    units = Units(array(heads), array(neurons), array(heads), array(neurons))
    return units, array(heads) > 2, array(neurons) > 2, draw(st.integers(0, 25))


def allowed(pairs, units, p, q):
    """Whether p and q may change places; heads come first in the numbering."""
    layers, heads = units.head_value.shape
    neurons, first = units.neuron_value.shape[1], layers * heads

    def place(unit):
        return (unit // heads, 0) if unit < first else ((unit - first) // neurons, 1)

    (layer_p, kind_p), (layer_q, kind_q) = place(p), place(q)
    same = layer_p == layer_q
    return {"all": True, "same_layer": same, "same_layer_cross": same and kind_p != kind_q}[pairs]


def naive(units, budget, mask, pairs, literal):
    """The rules of refine_masks, word for word: every pair, every time."""
    value, cost, mask = units.value, units.cost, mask.copy()
    if not literal:
        while cost[mask].sum() > budget:
            droppable = [i for i in np.flatnonzero(mask) if cost[i] > 0]
            mask[min(droppable, key=lambda i: (value[i] / cost[i], -cost[i], -i))] = False
    while True:
        slack = budget - cost[mask].sum()
        moves = []
        for q in np.flatnonzero(~mask):
            if not literal and cost[q] <= slack:
                moves.append((value[q], -cost[q], -1, q))
            for p in np.flatnonzero(mask):
                fits = cost[q] >= cost[p] if literal else cost[q] - cost[p] <= slack
                if fits and allowed(pairs, units, p, q):
                    freed = cost[q] - cost[p] if literal else cost[p] - cost[q]
                    moves.append((value[q] - value[p], freed, p, q))
        moves = [move for move in moves if move[0] > 0]
        if not moves:
            return mask
        _, _, p, q = min(moves, key=lambda m: (-m[0], -m[1], m[2], m[3]))
        mask[q] = True
        if p >= 0:
            mask[p] = False


@pytest.mark.parametrize("literal", [False, True], ids=["retain", "printed"])
@pytest.mark.parametrize("pairs", PAIRS)
@given(problem=problems())
@settings(max_examples=150)
def test_refinement_follows_its_rules(pairs, literal, problem):
    units, heads, neurons, budget = problem
    start = np.concatenate([heads.ravel(), neurons.ravel()])
    found = refine_masks(units, budget, heads, neurons, pairs=pairs, literal=literal)
    mask = np.concatenate([found.head_mask.ravel(), found.neuron_mask.ravel()])
    assert bits(mask) == bits(naive(units, budget, start, pairs, literal))
    assert found.converged
    assert found.value == units.value[mask].sum()
    assert found.masked_cost == units.cost[~mask].sum()
    if literal:
        assert found.masked_value <= units.value[~start].sum()
        assert found.masked_cost >= 0
    else:
        assert found.cost <= budget
        if units.cost[start].sum() <= budget:
            assert found.value >= units.value[start].sum()


def test_large_refinement_gains_within_bound_and_budget():
    rng = np.random.default_rng(2)
    shapes = ((4, 8), (4, 500))
    heads, neurons = (rng.lognormal(0, 1, s) for s in shapes)
    units = Units(heads, neurons, *(rng.lognormal(0, 1, s) for s in shapes))
    budget = 0.5 * units.cost.sum()
    start = [rng.random(s) < 0.5 for s in shapes]
    bound = solve_mask(units.value, units.cost, budget).upper_bound
    for pairs in PAIRS:
        repaired = refine_masks(units, budget, *start, pairs=pairs, max_moves=0)
        found = refine_masks(units, budget, *start, pairs=pairs)
        assert found.converged
        assert repaired.value < found.value <= bound
        assert found.cost <= budget * (1 + 1e-12)
        mask = np.concatenate([found.head_mask.ravel(), found.neuron_mask.ravel()])
        slack = budget - units.cost[mask].sum()
        assert not (units.cost[~mask] <= slack).any()  # nothing more fits


@pytest.mark.parametrize("pairs", PAIRS)
def test_moves_of_a_larger_problem_are_those_of_the_rules(pairs):
    rng = np.random.default_rng(6)
    shapes = ((2, 3), (2, 25), (2, 3), (2, 25))
    units = Units(*(rng.integers(1, 40, s) for s in shapes))
    heads, neurons = np.ones((2, 3), dtype=bool), np.arange(50).reshape(2, 25) % 3 == 0
    start = np.concatenate([heads.ravel(), neurons.ravel()])
    for budget in (150, 400, 700):
        found = refine_masks(units, budget, heads, neurons, pairs=pairs)
        mask = np.concatenate([found.head_mask.ravel(), found.neuron_mask.ravel()])
        assert bits(mask) == bits(naive(units, budget, start, pairs, False))
        assert found.swaps + found.adds + found.repairs > 5


def test_refinement_does_not_depend_on_the_unit_of_measure():
    rng = np.random.default_rng(4)
    arrays = [rng.lognormal(0, 1, s) for s in ((3, 4), (3, 30), (3, 4), (3, 30))]
    start = (np.ones((3, 4)), np.zeros((3, 30)))
    budget = 0.4 * (arrays[2].sum() + arrays[3].sum())
    one = refine_masks(Units(*arrays), budget, *start)
    tiny = [a * 2.0**-90 for a in arrays]
    other = refine_masks(Units(*tiny), budget * 2.0**-90, *start)
    assert bits(one.neuron_mask) == bits(other.neuron_mask)
    assert one.swaps == other.swaps > 0


def test_refinement_errors():
    units = one_layer([1], [1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match=r"pairs must be 'same_layer_cross', .* got 'near'"):
        refine(units, 1, "1", "11", pairs="near")
    with pytest.raises(ValueError, match=r"neuron_mask must have shape \(1, 2\), got \(1, 3\)"):
        refine(units, 1, "1", "111")
    with pytest.raises(TypeError, match="head_mask must be an array of numbers or booleans"):
        refine_masks(units, 1, [["a"]], [[1, 1]])
    with pytest.raises(ValueError, match="budget must be a number >= 0, got nan"):
        refine(units, float("nan"), "1", "11")
    with pytest.raises(ValueError, match=r"value\[1\] must be a finite number >= 0, got -1"):
        refine(one_layer([1], [1], [-1, 1], [1, 1]), 1, "1", "11")
    with pytest.raises(ValueError, match=r"\[L, H\] for heads and \[L, I\] for neurons"):
        Units(np.ones((2, 1)), np.ones((1, 1)), np.ones((2, 1)), np.ones((1, 1)))


def scores_of(layers=4, heads=3, neurons=20, seed=0):
    rng = np.random.default_rng(seed)

    def draw(units):
        return rng.lognormal(0, 1, (layers, units))

    return SimpleNamespace(
        head_fisher=draw(heads),
        neuron_fisher=draw(neurons),
        head_taylor=4 * draw(heads),
        neuron_taylor=draw(neurons),
    )


def taylor_mass(scores):
    return scores.head_taylor.sum() + scores.neuron_taylor.sum()


def test_global_masks_are_the_two_class_solution_refined():
    scores = scores_of()
    found = determine(scores, dataclasses.replace(PRESETS["global"], refine="none"))
    limit = 0.5 * taylor_mass(scores)
    plain = solve_two_class(
        scores.head_fisher.ravel(),
        scores.neuron_fisher.ravel(),
        scores.head_taylor.mean(),
        scores.neuron_taylor.mean(),
        limit,
    )
    assert bits(found.head_mask) == bits(plain.head_mask)
    assert bits(found.neuron_mask) == bits(plain.neuron_mask)
    assert found.certificate["optimal"]
    assert found.certificate["budget"] == pytest.approx(limit)
    refined = determine(scores, "global")
    expected = refine_masks(
        Units(scores.head_fisher, scores.neuron_fisher, scores.head_taylor, scores.neuron_taylor),
        limit,
        found.head_mask,
        found.neuron_mask,
    )
    assert bits(refined.neuron_mask) == bits(expected.neuron_mask)
    assert refined.certificate["cost"] <= limit * (1 + 1e-12)
    assert refined.certificate["upper_bound"] >= refined.certificate["value"]
    assert refined.moves["repairs"] + refined.moves["adds"] + refined.moves["swaps"] > 0


def test_exact_masks_are_the_knapsack_solution():
    scores = scores_of()
    found = determine(scores, "exact", 0.3)
    value = np.concatenate([scores.head_fisher.ravel(), scores.neuron_fisher.ravel()])
    cost = np.concatenate([scores.head_taylor.ravel(), scores.neuron_taylor.ravel()])
    plain = solve_mask(value, cost, 0.3 * cost.sum())
    assert bits(found.head_mask) + bits(found.neuron_mask) == bits(plain.mask)
    certificate = found.certificate
    assert certificate["optimal"]
    assert certificate["gap"] == certificate["upper_bound"] - certificate["value"]
    assert certificate["value"] >= determine(scores, "global", 0.3).certificate["value"]


def test_layers_share_one_absolute_budget():
    scores = scores_of()
    scores.neuron_taylor[0] *= 10  # the first layer can mask fewer of its dear units
    scores.head_taylor[0] *= 10
    found = determine(scores, "paper_layer")
    share = 0.5 * taylor_mass(scores) / 4
    for layer in range(4):
        start = solve_two_class_literal(
            scores.head_fisher[layer],
            scores.neuron_fisher[layer],
            scores.head_taylor[layer].mean(),
            scores.neuron_taylor[layer].mean(),
            share,
        )
        units = Units(
            *(
                getattr(scores, name)[layer : layer + 1]
                for name in ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor")
            )
        )
        expected = refine(units, 0, bits(start.head_mask), bits(start.neuron_mask), literal=True)
        assert bits(found.neuron_mask[layer]) == bits(expected.neuron_mask)
        assert bits(found.head_mask[layer]) == bits(expected.head_mask)
    masked = (~found.neuron_mask).sum(axis=1)
    assert masked[0] < masked[1:].min()
    assert found.certificate["budget"] == pytest.approx(4 * share)
    masked_cost = scores.head_taylor[~found.head_mask].sum()
    masked_cost += scores.neuron_taylor[~found.neuron_mask].sum()
    assert found.certificate["cost"] == pytest.approx(masked_cost)


def test_printed_algorithm_equals_the_complementary_global_budget():
    scores = scores_of()
    printed = determine(scores, "alg1_literal", 0.25)
    retained = determine(scores, Preset("retain"), 0.75)
    differing = (printed.head_mask != retained.head_mask).sum()
    differing += (printed.neuron_mask != retained.neuron_mask).sum()
    assert differing <= 2  # rounding to whole units on either side
    everything = determine(scores, "alg1_literal", 1.0)
    assert everything.head_mask.any()


def test_pooled_costs_ignore_the_class():
    scores = scores_of()
    found = determine(scores, Preset("pooled", cost="pooled"), 0.5)
    fisher = np.concatenate([scores.head_fisher.ravel(), scores.neuron_fisher.ravel()])
    kept = np.concatenate([found.head_mask.ravel(), found.neuron_mask.ravel()])
    assert kept.sum() == kept.size // 2
    assert fisher[kept].min() >= fisher[~kept].max()


def test_better_start_is_at_least_as_good():
    scores = scores_of(seed=3)
    better = determine(scores, dataclasses.replace(PRESETS["global"], start="better"))
    assert better.certificate["value"] > determine(scores, "global").certificate["value"]


def test_whole_budget_retains_everything_and_is_certified():
    for name in ("global", "exact"):
        found = determine(scores_of(), name, 1.0)
        assert found.head_mask.all()
        assert found.neuron_mask.all()
        assert found.certificate["optimal"]


def test_determination_is_repeatable():
    for name in PRESETS:
        one, other = determine(scores_of(), name), determine(scores_of(), name)
        assert bits(one.neuron_mask) == bits(other.neuron_mask)
        assert one.certificate == other.certificate


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_budget_is_a_fraction(budget):
    with pytest.raises(ValueError, match=r"budget must be a fraction in \(0, 1\], got"):
        determine(scores_of(), "global", budget)


def test_presets_check_their_options():
    assert preset_of("exact") is PRESETS["exact"]
    assert preset_of(PRESETS["exact"]) is PRESETS["exact"]
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'best'"):
        preset_of("best")
    with pytest.raises(ValueError, match=r"cost must be one of .* got 'free'"):
        Preset("x", cost="free")
    with pytest.raises(ValueError, match="needs one cost per class"):
        Preset("x", objective="alg1_literal", cost="unit")
    for objective, stage in (("retain", "alg2_literal"), ("alg1_literal", "swap")):
        with pytest.raises(ValueError, match="spends another budget"):
            Preset("x", objective=objective, refine=stage)


def test_every_combination_of_options_runs():
    scores = scores_of(2, 2, 5)
    for granularity, cost, pairs in itertools.product(
        ("global", "layer"), ("class_mean", "unit", "pooled"), PAIRS
    ):
        preset = Preset("x", granularity=granularity, cost=cost, refine="swap", pairs=pairs)
        found = determine(scores, preset, 0.4)
        assert found.certificate["cost"] <= found.certificate["budget"] * (1 + 1e-12)
