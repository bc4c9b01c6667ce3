import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.selection.modules import choose_modules

NAMES = ("gate_proj", "up_proj", "down_proj")


def test_a_choice_by_hand():
    scores = [[5, 1, 1], [0, 4, 3]]
    found = choose_modules(scores, [[2, 1, 1], [1, 2, 3]], 5, NAMES)
    assert found.modules == {0: ("gate_proj", "up_proj"), 1: ("up_proj",)}
    assert (found.score, found.parameters, found.optimal) == (10, 5, True)
    assert found.upper_bound >= 10
    assert found.chosen.tolist() == [[True, True, False], [False, True, False]]


def test_nothing_and_everything():
    scores, sizes = np.arange(1.0, 7).reshape(2, 3), np.ones((2, 3), int)
    assert choose_modules(scores, sizes, 0, NAMES).modules == {}
    assert choose_modules(scores, sizes, 6, NAMES).modules == {0: NAMES, 1: NAMES}
    zero = choose_modules(np.zeros((2, 3)), sizes, 6, NAMES)
    assert (zero.modules, zero.parameters) == ({}, 0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_choice_within_the_budget_scores_more(data):
    layers, units = data.draw(st.integers(1, 4)), 3
    entry = st.lists(st.integers(0, 6), min_size=layers * units, max_size=layers * units)
    scores = np.array(data.draw(entry), float).reshape(layers, units)
    sizes = np.array(data.draw(entry)).reshape(layers, units)
    budget = data.draw(st.integers(0, int(sizes.sum()) + 1))
    found = choose_modules(scores, sizes, budget, NAMES)
    choices = (np.arange(2**scores.size)[:, None] >> np.arange(scores.size)) & 1
    values, costs = choices @ scores.ravel(), choices @ sizes.ravel()
    assert found.score == values[costs <= budget].max()
    assert found.optimal
    assert found.parameters <= budget
    assert found.score == scores[found.chosen].sum()
    assert found.parameters == sizes[found.chosen].sum()
    pairs = {(i, NAMES.index(name)) for i, names in found.modules.items() for name in names}
    assert pairs == {tuple(pair) for pair in np.argwhere(found.chosen)}


def test_bad_input():
    with pytest.raises(ValueError, match=r"must be \[L, P\]"):
        choose_modules(np.ones((2, 3)), np.ones((2, 2), int), 1, NAMES)
    with pytest.raises(ValueError, match="names P different ones"):
        choose_modules(np.ones((2, 2)), np.ones((2, 2), int), 1, ("up", "up"))
    with pytest.raises(ValueError, match=r"value\[0\] must be a finite number >= 0"):
        choose_modules([[-1.0]], [[1]], 1, ("up",))
    with pytest.raises(TypeError, match="parameters must be integers, got dtype float64"):
        choose_modules([[1.0]], [[1.5]], 1, ("up",))
    with pytest.raises(ValueError, match=r"budget must be in \[0, 2\*\*63\), got -1"):
        choose_modules([[1.0]], [[1]], -1, ("up",))


def test_budgets_beyond_the_solvers_digits():
    most = 2**38
    whole = choose_modules(np.ones((1, 3)), np.full((1, 3), most), 10**18, NAMES[:3])
    assert (whole.parameters, whole.optimal) == (3 * most, True)
    with pytest.raises(ValueError, match=r"budget must be below 2\*\*39 parameters"):
        choose_modules(np.ones((1, 3)), np.full((1, 3), most), 3 * most - 1, NAMES[:3])
    with pytest.raises(ValueError, match=r"parameters must be in \[0, 2\*\*39\), got 1 to"):
        choose_modules([[1.0, 1.0]], np.array([[1, 2**63]], np.uint64), 1, NAMES[:2])
