import numpy as np
import pytest
from helpers.all_choices import best_values
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.selection.masks.solvers import (
    Units,
    refine_masks,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
)

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
@settings(max_examples=150, deadline=None)
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


def test_thousands_of_refinements_end_where_no_move_gains():
    rng = np.random.default_rng(10)
    for n in range(1, 15):
        value, cost = rng.integers(0, 25, (2, 360, n))
        budget = rng.integers(0, cost.sum(1) + 2)
        start = rng.random((360, n)) < 0.5
        best = best_values(value, cost, budget)
        for v, c, limit, kept, most in zip(value, cost, budget, start, best, strict=True):
            units = one_layer([], [], v, c)
            found = refine_masks(units, limit, np.ones((1, 0)), kept[None], pairs="all")
            mask = found.neuron_mask[0]
            assert found.cost == c[mask].sum() <= limit
            assert found.value == v[mask].sum() <= most
            slack = limit - found.cost
            gains = v[~mask][:, None] - v[mask]
            fits = c[~mask][:, None] - c[mask] <= slack
            assert not (gains[fits] > 0).any()
            assert not v[~mask][c[~mask] <= slack].any()


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


@pytest.mark.parametrize("pairs", ["same_layer_cross", "same_layer", "all"])
@pytest.mark.parametrize("literal", [False, True])
def test_no_limit_holds_for_costs_whose_sum_overflows(pairs, literal):
    costs, values = np.array([[1e308, 1e308, 1.0, 2.0]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    start = np.array([[1, 1, 0, 0]])
    found = refine_masks(
        Units(values, values, costs, costs), np.inf, start, start, pairs=pairs, literal=literal
    )
    assert found.converged
    if not literal:
        assert found.head_mask.all()
        assert found.neuron_mask.all()
        assert (found.value, found.adds, found.repairs) == (20, 4, 0)


def test_costs_whose_sum_overflows_are_refused_under_a_limit():
    costs, values = np.array([[1e308, 1e308]]), np.ones((1, 2))
    none = np.zeros((1, 0))
    with pytest.raises(ValueError, match=r"cost must sum to less than 2\*\*1021"):
        refine_masks(Units(values, none, costs, none), 1.0, values, none)


def test_repair_sees_small_costs_beside_those_it_took_away():
    costs, values = np.array([[1e-200, 0.7, 0.3]]), np.ones((1, 3))
    none = np.zeros((1, 0))
    found = refine_masks(Units(values, none, costs, none), 0.0, values, none)
    assert (found.cost, found.repairs) == (0, 3)


def test_repair_orders_ratios_that_vanish_as_floats():
    values, costs = np.array([[3e-300, 1e-300]]), np.array([[2e300, 1e300]])
    none = np.zeros((1, 0))
    found = refine_masks(
        Units(values, none, costs, none), 2e300, np.ones((1, 2)), none, max_moves=0
    )
    assert found.head_mask.tolist() == [[True, False]]
