import itertools
import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.all_choices import best_values
from hypothesis import given, settings
from hypothesis import strategies as st

from floe import _native
from floe.selection.masks.solvers import solve_mask, solve_two_class

INFINITY = float("inf")
NAN = float("nan")


def bits(mask):
    return "".join("1" if kept else "0" for kept in mask)


def brute_force(value, cost, budget):
    best = 0
    for kept in itertools.product((0, 1), repeat=len(value)):
        if sum(itertools.compress(cost, kept)) <= budget:
            best = max(best, sum(itertools.compress(value, kept)))
    return best


@pytest.mark.parametrize(
    ("value", "cost", "budget", "mask", "lambda_", "bound"),
    [
        pytest.param((60, 100, 120), (10, 20, 30), 50, "011", 4, 240, id="greedy-suboptimal"),
        pytest.param((10, 6, 6), (10, 5, 5), 10, "011", 1, 12, id="swaps-stuck"),
        pytest.param((8, 7, 5, 4, 3), (6, 2, 1, 3, 2), 8, "01111", 4 / 3, 19, id="mean-cost-8"),
        pytest.param((8, 7, 5, 4, 3), (6, 2, 1, 3, 2), 9, "11100", 4 / 3, 61 / 3, id="mean-cost-9"),
    ],
)
def test_knapsack_examples(value, cost, budget, mask, lambda_, bound):
    found = solve_mask(value, cost, budget)
    assert bits(found.mask) == mask
    assert found.optimal
    assert found.lambda_ == pytest.approx(lambda_, rel=1e-12)
    assert found.upper_bound == pytest.approx(bound, rel=1e-12)
    assert found.gap == pytest.approx(bound - found.value, abs=1e-9)
    assert found.head_mask is None


def test_greedy_alone_knows_that_it_may_be_wrong():
    found = solve_mask((60, 100, 120), (10, 20, 30), 50, max_nodes=0)
    assert (bits(found.mask), found.value, found.optimal) == ("110", 160, False)


def test_greedy_goes_on_behind_what_does_not_fit():
    found = solve_mask((50, 12, 1), (5, 4, 1), 6, max_nodes=0)
    assert bits(found.mask) == "101"


def test_knapsack_ties_go_to_free_then_valuable_then_first_units():
    assert bits(solve_mask((1, 1, 1), (1, 1, 1), 2, max_nodes=0).mask) == "110"
    assert bits(solve_mask((1, 2, 1), (1, 2, 1), 2, max_nodes=0).mask) == "010"
    assert bits(solve_mask((0, 3, 0), (0, 5, 1), 0).mask) == "100"
    assert bits(solve_mask((1,) * 6000, (1,) * 6000, 10, max_nodes=0).mask) == "1" * 10 + "0" * 5990


@pytest.mark.parametrize("budget", [INFINITY, 3.0, 100.0])
def test_everything_fits(budget):
    found = solve_mask((1, 2), (1, 2), budget)
    assert (bits(found.mask), found.optimal, found.gap, found.lambda_) == ("11", True, 0, 0)


def test_a_unit_dearer_than_the_budget_does_not_weaken_the_bound():
    found = solve_mask((1e6, 3, 2), (11, 5, 5), 10)
    assert (bits(found.mask), found.upper_bound, found.optimal) == ("011", 5, True)


def test_no_units():
    found = solve_mask([], [], 1)
    assert (len(found.mask), found.value, found.gap, found.optimal) == (0, 0, 0, True)


UNITS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=11)


@given(UNITS, st.integers(0, 60), st.sampled_from([0, 3, 10**6]))
@settings(max_examples=300, deadline=None)
def test_knapsack_against_brute_force(units, budget, max_nodes):
    value, cost = [u[0] for u in units], [u[1] for u in units]
    best = brute_force(value, cost, budget)
    found = solve_mask(value, cost, budget, max_nodes=max_nodes)
    assert found.value == sum(itertools.compress(value, found.mask)) <= best
    assert found.cost == sum(itertools.compress(cost, found.mask)) <= budget
    assert found.masked_value == sum(value) - found.value
    assert found.upper_bound >= best * (1 - 1e-12)
    usable = [(v, c) for v, c in units if c <= budget]
    dual = found.lambda_ * budget + sum(max(0, v - found.lambda_ * c) for v, c in usable)
    assert found.upper_bound == pytest.approx(dual, rel=1e-12)
    if max_nodes > 3:
        assert found.optimal
    if found.optimal:
        assert found.value == best


@pytest.mark.parametrize("correlated", [False, True])
def test_thousands_of_small_knapsacks_are_the_best_of_all(correlated):
    rng = np.random.default_rng(8)
    for units in range(1, 15):
        value, cost = rng.integers(0, 30, (2, 240, units))
        if correlated:
            value = np.maximum(0, cost + value % 3 - 1)
        budget = rng.integers(0, cost.sum(1) + 2)
        best = best_values(value, cost, budget)
        for v, c, limit, most in zip(value, cost, budget, best, strict=True):
            found = solve_mask(v, c, limit)
            assert found.optimal
            assert found.value == v[found.mask].sum() == most
            assert found.cost == c[found.mask].sum() <= limit
            greedy = solve_mask(v, c, limit, max_nodes=0)
            assert greedy.value <= most <= greedy.upper_bound * (1 + 1e-12)
            if greedy.value == most:
                assert np.array_equal(greedy.mask, found.mask)


@pytest.mark.parametrize("spread", [3, 30, 300])
def test_knapsack_against_dynamic_programming(spread):
    rng = np.random.default_rng(spread)
    for _ in range(15):
        cost = rng.integers(1, 100, 80)
        value = np.maximum(cost + rng.integers(-spread, spread + 1, 80), 0)
        budget = int(cost.sum() * rng.uniform(0.1, 0.9))
        best = np.zeros(budget + 1)  # best[c]: the most value for c
        for v, c in zip(value, cost, strict=True):
            best[c:] = np.maximum(best[c:], best[:-c] + v)
        found = solve_mask(value, cost, budget)
        assert found.optimal
        assert found.value == best[-1]


@pytest.mark.parametrize("seed", [1, 2, 6, 13, 15, 20, 23, 26, 27, 28, 55])
def test_knapsacks_beyond_the_first_search_against_dynamic_programming(seed):
    """More than its 50,000 states: the answer comes from the joined lists of changes."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 3000, 300)
    value = cost * 1000 + rng.integers(-3000, 3000, 300).clip(-1000 * cost)
    budget = int(cost.sum() * 0.3)
    best = np.zeros(budget + 1)
    for v, c in zip(value, cost, strict=True):
        best[c:] = np.maximum(best[c:], best[:-c] + v)
    found = solve_mask(value, cost, budget)
    assert 50_000 < found.nodes < 100_000  # without the lists, millions
    assert found.optimal
    assert found.value == value[found.mask].sum() == best[-1]
    assert found.cost == cost[found.mask].sum() <= budget


def test_totals_keep_what_rounding_would_lose():
    large, ones = [1e16], [1.0] * 1000
    found = solve_mask(large + ones, [0.0] * 1001, 1.0)
    assert found.value == 1e16 + 1000
    assert solve_two_class(large, ones, 0.0, 1.0, 1000).value == 1e16 + 1000


FLOATS = st.floats(1e-9, 1e9)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=9), st.floats(0, 1))
@settings(deadline=None)
def test_knapsack_of_floats_of_any_size(units, share):
    value, cost = [u[0] for u in units], [u[1] for u in units]
    budget = share * sum(cost)
    found = solve_mask(value, cost, budget)
    best = brute_force(value, cost, budget)
    assert found.optimal
    assert found.value >= best * (1 - 1e-11)
    assert found.cost <= budget * (1 + 2e-12)
    assert found.upper_bound >= best * (1 - 1e-11)


def test_large_correlated_knapsack_is_proven():
    rng = np.random.default_rng(7)
    cost = rng.integers(1, 1000, 5000).astype(float)
    value = cost + rng.integers(-50, 50, 5000).clip(-cost + 1)
    budget = float(cost.sum() // 2)
    greedy = solve_mask(value, cost, budget, max_nodes=0)
    found = solve_mask(value, cost, budget)
    assert found.optimal
    assert greedy.value <= found.value <= found.upper_bound
    assert found.value == value[found.mask].sum()
    assert found.cost == cost[found.mask].sum() <= budget


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_solutions_do_not_depend_on_the_unit_of_measure(scale):
    rng = np.random.default_rng(3)
    value, cost = rng.lognormal(0, 2, 400), rng.lognormal(0, 1, 400)
    budget = 0.5 * cost.sum()
    one = solve_mask(value, cost, budget)
    other = solve_mask(value * scale, cost * scale, budget * scale)
    assert np.array_equal(one.mask, other.mask)
    assert one.optimal
    assert other.optimal
    assert one.nodes == other.nodes
    assert one.nodes > 0


def test_close_ratios_are_ordered_exactly():
    """Ratios that agree in their leading 32 bits, and one far away that widens the key range."""
    steps = np.arange(5000)
    cost = np.where(steps % 2, 1.0, 2.0)
    value = (1.0 + steps * 2.0**-50) * cost
    found = solve_mask([*value, 1e-300], [*cost, 1.0], 150.0, max_nodes=0)
    assert np.array_equal(np.flatnonzero(found.mask), np.arange(4900, 5000))


def test_knapsack_errors():
    with pytest.raises(ValueError, match=r"value\[2\] must be a finite number >= 0, got nan"):
        solve_mask([1, 2, NAN, -1], [1, 1, 1, NAN], 1)
    with pytest.raises(ValueError, match=r"cost\[0\] must be a finite number >= 0, got -2"):
        solve_mask([1, 2], [-2, 1], 1)
    with pytest.raises(ValueError, match=r"cost must be as long as value \(2\), got 1"):
        solve_mask([1, 2], [1], 1)
    with pytest.raises(ValueError, match=r"value must have 1 dimension.*\(1, 2\)"):
        solve_mask([[1, 2]], [1, 2], 1)
    with pytest.raises(TypeError, match="value must be an array of real numbers, got dtype bool"):
        solve_mask([True], [1], 1)
    with pytest.raises(TypeError, match="budget must be a number, got str"):
        solve_mask([1], [1], "1")
    with pytest.raises(TypeError, match="budget must be a number, got bool"):
        solve_mask([1], [1], True)
    with pytest.raises(TypeError, match="max_nodes must be an integer, got float"):
        solve_mask([1], [1], 1, max_nodes=1.5)
    with pytest.raises(ValueError, match=r"max_nodes must be in \[0, 2\*\*63\), got -1"):
        solve_mask([1], [1], 1, max_nodes=-1)


def test_greedy_of_many_tied_units_follows_its_order():
    """Above the size where only a bucket is sorted: equal ratios, equal values, free units."""
    rng = np.random.default_rng(4)
    for value, cost in (
        (rng.integers(0, 4, 40_000), rng.integers(0, 3, 40_000)),
        (np.ones(40_000), np.ones(40_000)),
        (rng.integers(1, 9, 40_000), None),
        (rng.random(40_000) * 1e-3 + 1.0, np.ones(40_000)),
    ):
        value = value.astype(float)
        cost = 2.0 * value if cost is None else cost.astype(float)
        budget = float(0.4 * cost.sum()) + 0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(cost == 0, np.inf, value / cost)
        order = np.lexsort((np.arange(40_000), -value, -ratio))
        expected, left = np.zeros(40_000, dtype=bool), budget
        for i in order:
            if cost[i] <= left:
                expected[i] = True
                left -= cost[i]
        assert np.array_equal(solve_mask(value, cost, budget, max_nodes=0).mask, expected)


def test_progress_counts_states_and_what_it_raises_cancels():
    rng = np.random.default_rng(0)
    cost = rng.integers(10**8, 10**9, 400).astype(float)
    seen = []

    def stop_later(done):
        seen.append(done)
        if len(seen) == 3:
            raise RuntimeError("enough")

    limits = (10**12, 0.0, stop_later)
    with pytest.raises(RuntimeError, match="enough"):
        _native.solve_knapsack(cost + 10**7, cost, cost.sum() / 3 + 0.1, *limits)
    assert len(seen) == 3
    assert 0 < seen[0] <= seen[1] <= seen[2]


HARD = """
import signal
import numpy as np
from floe.selection.masks.solvers import solve_mask
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
rng = np.random.default_rng(0)
cost = rng.integers(10**8, 10**9, 400).astype(float)
value = cost + 10**7  # strongly correlated: no bound prunes
print("go", flush=True)
try:
    solve_mask(value, cost, cost.sum() / 3 + 0.123, max_nodes=10**12)
    print("ended")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_search_ends_at_its_node_and_time_limits():
    rng = np.random.default_rng(0)
    cost = rng.integers(10**8, 10**9, 400).astype(float)
    value, budget = cost + 10**7, cost.sum() / 3 + 0.123
    few = solve_mask(value, cost, budget, max_nodes=1000)
    again = solve_mask(value, cost, budget, max_nodes=1000)
    assert not few.optimal
    assert few.nodes < 10_000
    assert np.array_equal(few.mask, again.mask)
    timed = _native.solve_knapsack(value, cost, budget, 10**12, 0.05, None)
    assert timed["value"] <= timed["upper_bound"]
    assert timed["cost"] <= budget


def test_ctrl_c_ends_a_long_search():
    with subprocess.Popen([sys.executable, "-c", HARD], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "go\n"
        timer = threading.Timer(0.5, os.kill, (child.pid, signal.SIGINT))
        timer.start()
        try:
            assert child.communicate(timeout=60)[0] == "interrupted\n"
        finally:
            timer.cancel()
            child.kill()


def test_other_threads_run_meanwhile():
    """The solver releases the interpreter: a thread ticks while one long call is under way."""
    rng = np.random.default_rng(0)
    cost = rng.integers(10**8, 10**9, 400).astype(float)
    started, ticks, done = threading.Event(), [], threading.Event()

    def tick():
        started.set()
        while not done.wait(0.005):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    started.wait()
    before = len(ticks)
    _native.solve_knapsack(cost + 10**7, cost, cost.sum() / 3 + 0.123, 10**12, 0.3, None)
    counted = len(ticks) - before
    done.set()
    thread.join()
    assert counted >= 3


def test_ratios_that_vanish_as_floats_still_order_units():
    """3e-300 / 3e300 and its likes are all 0 as floats, which hid a better choice and its bound."""
    found = solve_mask((3e-300, 2e-300, 2e-300), (3e300, 2e300, 2e300), 4e300)
    assert (bits(found.mask), found.value, found.optimal) == ("011", 4e-300, True)
    greedy = solve_mask((3e-300, 2e-300, 2e-300), (3e300, 2e300, 2e300), 4e300, max_nodes=0)
    assert greedy.upper_bound == pytest.approx(4e-300, rel=1e-12, abs=0)


def test_the_least_and_the_largest_floats_are_numbers_like_others():
    least, most = 5e-324, np.finfo(float).max
    found = solve_mask((60 * least, 100 * least, 120 * least), (10, 20, 30), 50)
    assert (bits(found.mask), found.value, found.optimal) == ("011", 220 * least, True)
    found = solve_mask((60, 100, 120), (10 * least, 20 * least, 30 * least), 50 * least)
    assert bits(found.mask) == "011"
    found = solve_mask((1, 1), (1.7e308, 1.7e308), most)  # with its tolerance the budget overflowed
    assert (bits(found.mask), found.masked_cost) == ("10", 1.7e308)


@pytest.mark.parametrize("units", [7, 60, 9000])
@pytest.mark.parametrize(("up", "down"), [(700, -700), (-700, 700), (-1000, -300), (900, 900)])
def test_powers_of_two_change_no_choice(units, up, down):
    rng = np.random.default_rng(units)
    value, cost = rng.random((2, units))
    budget = cost.sum() / 3
    plain = solve_mask(value, cost, budget, max_nodes=10**5)
    found = solve_mask(
        np.ldexp(value, up), np.ldexp(cost, down), math.ldexp(budget, down), max_nodes=10**5
    )
    assert np.array_equal(found.mask, plain.mask)
    assert found.value == math.ldexp(plain.value, up)
    assert found.upper_bound == pytest.approx(math.ldexp(plain.upper_bound, up), rel=1e-12, abs=0)
    assert found.nodes == plain.nodes
    halves = np.split(value, [units // 2])
    plain = solve_two_class(*halves, 2.0, 3.0, budget)
    found = solve_two_class(
        *(np.ldexp(half, up) for half in halves),
        *(math.ldexp(number, down) for number in (2.0, 3.0, budget)),
    )
    assert np.array_equal(found.mask, plain.mask)
    if up - down < 1000:
        assert found.lambda_ == math.ldexp(plain.lambda_, up - down)


def test_sums_beyond_floats_are_refused():
    with pytest.raises(ValueError, match=r"value must sum to less than 2\*\*1021 in size, got inf"):
        solve_mask((1e308, 1e308), (1, 1), 1)
    with pytest.raises(ValueError, match="head_value must sum to less"):
        solve_two_class((1e308, 1e308), (), 1, 1, 1)
    with pytest.raises(ValueError, match="budget must be in the range of floats"):
        solve_mask((1,), (1,), 10**400)


def test_arrays_in_any_memory_are_read_alike():
    value, cost = np.array([60.0, 100.0, 120.0]), np.array([10.0, 20.0, 30.0])
    raw = np.zeros(25, np.uint8)
    unaligned = raw[1:].view(float)
    unaligned[:] = value
    fixed = cost.copy()
    fixed.flags.writeable = False
    for values, costs in ((unaligned, fixed), (value.astype(">f8"), np.repeat(cost, 2)[::2])):
        assert bits(solve_mask(values, costs, 50).mask) == "011"
