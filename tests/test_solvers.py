import itertools
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.selection.solvers import solve_mask, solve_two_class, solve_two_class_literal

INFINITY = float("inf")
NAN = float("nan")


def bits(mask):
    return "".join("1" if kept else "0" for kept in mask)


# budget: retained heads, neurons, value, cost | literal: masked value, masked cost, heads, neurons
E1 = [
    (0, "000", "0000", 0, 0, 0, 0, "111", "1111"),
    (1.9, "000", "0000", 0, 0, 0, 0, "111", "1111"),
    (2, "000", "1000", 5, 2, 1, 2, "111", "1110"),
    (4, "100", "0000", 9, 4, 1, 4, "110", "1111"),
    (7, "100", "1000", 14, 6, 2, 6, "110", "1110"),
    (8, "100", "1100", 17, 8, 4, 8, "110", "1100"),
    (10, "100", "1110", 19, 10, 6, 10, "100", "1110"),
    (12, "110", "1100", 21, 12, 8, 12, "100", "1100"),
    (20, "111", "1111", 25, 20, 11, 8, "111", "0000"),
    (INFINITY, "111", "1111", 25, 20, 11, 8, "111", "0000"),
]


@pytest.mark.parametrize("row", E1, ids=lambda row: f"C{row[0]}")
def test_two_classes_in_both_readings(row):
    budget, heads, neurons, value, cost, loss, spent, literal_heads, literal_neurons = row
    found = solve_two_class([9, 4, 1], [5, 3, 2, 1], 4, 2, budget)
    assert (bits(found.head_mask), bits(found.neuron_mask)) == (heads, neurons)
    assert (found.value, found.cost, found.masked_value) == (value, cost, 25 - value)
    assert bits(found.mask) == heads + neurons
    assert found.optimal
    assert found.upper_bound >= value
    printed = solve_two_class_literal([9, 4, 1], [5, 3, 2, 1], 4, 2, budget)
    assert (bits(printed.head_mask), bits(printed.neuron_mask)) == (literal_heads, literal_neurons)
    assert (printed.masked_value, printed.masked_cost) == (loss, spent)
    assert (printed.value, printed.upper_bound, printed.gap) == (25 - loss, 25, loss)
    assert printed.optimal == (loss == 0)


@pytest.mark.parametrize("budget", [4, 8, 10, 12])
def test_printed_algorithm_equals_the_complementary_budget(budget):
    printed = solve_two_class_literal([9, 4, 1], [5, 3, 2, 1], 4, 2, budget)
    retained = solve_two_class([9, 4, 1], [5, 3, 2, 1], 4, 2, 20 - budget)
    assert bits(printed.mask) == bits(retained.mask)


def test_certificate_of_two_classes():
    found = solve_two_class([9, 4, 1], [5, 3, 2, 1], 4, 2, 10)
    assert (found.lambda_, found.upper_bound, found.gap) == (1, 19, 0)
    loose = solve_two_class([9, 4, 1], [5, 3, 2, 1], 4, 2, 7)
    assert (loose.lambda_, loose.upper_bound, loose.gap) == (1.5, 15.5, 1.5)


@pytest.mark.parametrize(
    ("args", "heads", "neurons", "value", "literal"),
    [
        pytest.param(((1, 1, 1), (1, 1), 2, 1, 4), "001", "11", 3, ("111", "00"), id="ties"),
        pytest.param(((3, 1), (2, 2), 1, 0, 1), "10", "11", 7, ("11", "00"), id="free-neurons"),
        pytest.param(((3, 1), (2, 2), 0, 1, 1), "11", "01", 6, ("11", "01"), id="free-heads"),
        pytest.param(((3, 1), (2, 2), 0, 0, 0), "11", "11", 8, ("11", "00"), id="all-free"),
        pytest.param(((0, 0), (0, 0, 0), 2, 1, 3), "00", "111", 0, ("11", "000"), id="all-zero"),
        pytest.param(((), (1, 2), 1, 1, 1), "", "01", 2, ("", "01"), id="no-heads"),
        pytest.param(((3,), (), 1, 1, 1), "1", "", 3, ("1", ""), id="no-neurons"),
        pytest.param(((), (), 1, 1, 1), "", "", 0, ("", ""), id="nothing"),
    ],
)
def test_two_class_corners(args, heads, neurons, value, literal):
    found = solve_two_class(*args)
    assert (bits(found.head_mask), bits(found.neuron_mask), found.value) == (heads, neurons, value)
    printed = solve_two_class_literal(*args)
    assert (bits(printed.head_mask), bits(printed.neuron_mask)) == literal


def test_budget_pays_for_units_in_spite_of_binary_floats():
    assert solve_two_class([], [1, 2, 3, 4], 1, 0.1, 0.3).mask.sum() == 3
    assert solve_two_class([1, 2, 3, 4], [], 0.1, 1, 0.3).mask.sum() == 3
    assert solve_two_class([1], [1, 1, 1], 0.1, 0.2, 0.7).mask.sum() == 4
    assert solve_mask([1, 2, 3, 4], [0.1] * 4, 0.3).mask.sum() == 3
    assert solve_two_class([], [1, 2, 3, 4], 1, 0.1, 0.3 - 5e-11).mask.sum() == 3
    assert solve_two_class([], [1, 2, 3, 4], 1, 0.1, 0.3 - 1e-6).mask.sum() == 2
    assert solve_mask([1, 2, 3, 4], [0.1] * 4, 0.3 - 1e-6).mask.sum() == 2


def test_small_units_of_a_large_budget_are_counted():
    found = solve_two_class([5.0], np.ones(1000), 1e6, 1e-3, 1e6 + 0.5)
    assert (found.head_mask.sum(), found.neuron_mask.sum()) == (0, 1000)
    found = solve_two_class([5000.0], np.ones(1000), 1e6, 1e-3, 1e6 + 0.5)
    assert found.head_mask.sum() == 1
    assert found.neuron_mask.sum() == pytest.approx(500, abs=1)  # 1e-12 of the budget is 1e-6
    found = solve_two_class([50.0], np.ones(5), 1e6, 1e-9, 1e6 + 3e-9)  # which 1e6 cannot resolve
    assert found.mask.sum() >= 4


SMALL = st.integers(0, 6)


@given(
    st.lists(SMALL, max_size=6),
    st.lists(SMALL, max_size=7),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 20),
)
def test_two_class_rules(heads, neurons, head_cost, neuron_cost, budget):
    """Every count of heads tried in exact arithmetic; masks follow from (value, index)."""

    def options():
        for n in range(len(heads) + 1):
            left = Fraction(budget) - n * head_cost
            if left >= 0:
                paid = left // neuron_cost if neuron_cost else len(neurons)
                yield n, min(paid, len(neurons))

    def least(values, count):  # the first `count` units in ascending (value, index)
        return sorted(range(len(values)), key=lambda i: (values[i], i))[:count]

    def masks(n, f):  # masking n heads and f neurons
        return [
            "".join("0" if i in least(values, k) else "1" for i in range(len(values)))
            for values, k in ((heads, n), (neurons, f))
        ]

    def top(n, f):
        return sum(sorted(heads)[len(heads) - n :]) + sum(sorted(neurons)[len(neurons) - f :])

    n, f = max(options(), key=lambda o: (top(*o), -o[0]))
    found = solve_two_class(heads, neurons, head_cost, neuron_cost, budget)
    expected = masks(len(heads) - n, len(neurons) - f)
    assert [bits(found.head_mask), bits(found.neuron_mask)] == expected
    assert found.value == top(n, f)
    assert found.cost == n * head_cost + f * neuron_cost <= budget
    assert found.upper_bound >= found.value

    def bottom(n, f):
        return sum(sorted(heads)[:n]) + sum(sorted(neurons)[:f])

    n, f = min(options(), key=lambda o: (bottom(*o), o[0]))
    printed = solve_two_class_literal(heads, neurons, head_cost, neuron_cost, budget)
    assert [bits(printed.head_mask), bits(printed.neuron_mask)] == masks(n, f)
    assert printed.masked_cost == n * head_cost + f * neuron_cost <= budget


def brute_force(value, cost, budget):
    best = 0
    for kept in itertools.product((0, 1), repeat=len(value)):
        if sum(itertools.compress(cost, kept)) <= budget:
            best = max(best, sum(itertools.compress(value, kept)))
    return best


@given(st.lists(SMALL, max_size=4), st.lists(SMALL, max_size=5), SMALL, SMALL, st.integers(0, 24))
def test_two_classes_are_exact(heads, neurons, head_cost, neuron_cost, budget):
    best = brute_force(
        heads + neurons, [head_cost] * len(heads) + [neuron_cost] * len(neurons), budget
    )
    assert solve_two_class(heads, neurons, head_cost, neuron_cost, budget).value == best


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
@settings(max_examples=300)
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


FLOATS = st.floats(1e-9, 1e9)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=9), st.floats(0, 1))
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


def test_order_of_units_does_not_matter():
    rng = np.random.default_rng(5)
    value, cost = rng.lognormal(0, 2, 9000), rng.lognormal(0, 1, 9000)
    order = rng.permutation(9000)
    one, other = solve_mask(value, cost, 4000.0), solve_mask(value[order], cost[order], 4000.0)
    assert np.array_equal(one.mask[order], other.mask)
    heads, neurons = value[:500], value[500:]
    mixed, shuffled = rng.permutation(500), rng.permutation(8500)
    one = solve_two_class(heads, neurons, 3.0, 0.7, 1234.5)
    other = solve_two_class(heads[mixed], neurons[shuffled], 3.0, 0.7, 1234.5)
    assert np.array_equal(one.head_mask[mixed], other.head_mask)
    assert np.array_equal(one.neuron_mask[shuffled], other.neuron_mask)


def test_large_inputs_follow_numpy_sorting():
    """Above the size where the radix sort takes over; ties everywhere."""
    rng = np.random.default_rng(11)
    value = rng.integers(0, 50, 20000) / 8.0
    found = solve_two_class([], value, 1.0, 1.0, 7000.0)
    masked = np.lexsort((np.arange(20000), value))[:13000]
    expected = np.ones(20000, dtype=bool)
    expected[masked] = False
    assert np.array_equal(found.neuron_mask, expected)
    cost = rng.integers(1, 9, 20000) / 4.0
    order = np.lexsort((np.arange(20000), -value, -value / cost))
    prefix = order[np.cumsum(cost[order]) <= 5000.0]
    greedy = solve_mask(value, cost, 5000.0, max_nodes=0)
    assert greedy.mask[prefix].all()
    assert greedy.mask.sum() - len(prefix) <= 8


def test_close_ratios_are_ordered_exactly():
    """Ratios that agree in their leading 32 bits, and one far away that widens the key range."""
    steps = np.arange(5000)
    value = np.r_[1.0 + steps * 2.0**-50, 1e-300]
    found = solve_mask(value, np.ones(5001), 100.0, max_nodes=0)
    assert np.array_equal(np.flatnonzero(found.mask), np.arange(4900, 5000))


@pytest.mark.parametrize("bad", [NAN, -1.0, INFINITY])
@pytest.mark.parametrize("where", ["head_value", "neuron_value", "head_cost", "neuron_cost"])
def test_two_class_errors_name_the_unit(bad, where):
    args = {"head_value": [1.0, 1], "neuron_value": [1.0, 1, 1], "head_cost": 1, "neuron_cost": 1}
    if where.endswith("value"):
        args[where][1:] = [bad, NAN] if where == "neuron_value" else [bad]
    else:
        args[where] = bad
    text = rf"{where}(\[1\])? must be a finite number >= 0, got {str(bad).removesuffix('.0')}"
    for solve in (solve_two_class, solve_two_class_literal):
        with pytest.raises(ValueError, match=text):
            solve(**args, budget=1)


@pytest.mark.parametrize("bad", [NAN, -1.0])
def test_budget_errors(bad):
    with pytest.raises(ValueError, match=r"budget must be a number >= 0, got (nan|-1)"):
        solve_two_class([1], [1], 1, 1, bad)
    with pytest.raises(ValueError, match=r"budget must be a number >= 0, got (nan|-1)"):
        solve_mask([1], [1], bad)


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
    with pytest.raises(ValueError, match="time_limit must be > 0 seconds, got 0"):
        solve_mask([1], [1], 1, time_limit=0)


def test_inputs_are_left_alone():
    value, cost = np.array([1.0, 3.0, -0.0]), np.array([1.0, 2.0, 1.0])
    value.flags.writeable = cost.flags.writeable = False
    solve_mask(value, cost, 2)
    solve_two_class(value, cost, 1, 1, 2)
    solve_mask(np.array([9, 1, 9, 2, 9])[1::2], np.float32([1, 1]), np.float32(1))
    assert value.tolist() == [1.0, 3.0, 0.0]


HARD = """
import signal
import numpy as np
from floe.selection.solvers import solve_mask
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
    timed = solve_mask(value, cost, budget, max_nodes=10**12, time_limit=0.05)
    assert timed.value <= timed.upper_bound
    assert timed.cost <= budget


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
    solve_mask(cost + 10**7, cost, cost.sum() / 3 + 0.123, max_nodes=10**12, time_limit=0.3)
    counted = len(ticks) - before
    done.set()
    thread.join()
    assert counted >= 3
