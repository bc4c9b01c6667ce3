import itertools
from fractions import Fraction

import numpy as np
import pytest
from helpers.all_choices import best_values
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.selection.masks.solvers import solve_mask, solve_two_class, solve_two_class_literal

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
    found = solve_two_class([50.0], np.ones(2), 1e6, 1e-9, 1e6 + 2e-9)  # rounds to 1.98e-9 above
    assert found.mask.sum() == 3


SMALL = st.integers(0, 6)


@given(
    st.lists(SMALL, max_size=6),
    st.lists(SMALL, max_size=7),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 20),
)
@settings(deadline=None)
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
@settings(deadline=None)
def test_two_classes_are_exact(heads, neurons, head_cost, neuron_cost, budget):
    best = brute_force(
        heads + neurons, [head_cost] * len(heads) + [neuron_cost] * len(neurons), budget
    )
    assert solve_two_class(heads, neurons, head_cost, neuron_cost, budget).value == best


def masked_least(values, count):
    """Retains all but the `count` least, masked in ascending (value, index)."""
    mask = np.ones(len(values), dtype=bool)
    mask[np.argsort(values, kind="stable")[:count]] = False
    return mask


def test_thousands_of_small_problems_are_the_best_of_all():
    rng = np.random.default_rng(9)
    for heads, neurons in itertools.product(range(8), range(8)):
        value = rng.integers(0, 20, (80, heads + neurons))
        prices = rng.integers(0, 9, (80, 2))
        cost = np.repeat(prices, (heads, neurons), axis=1)
        budget = rng.integers(0, cost.sum(1) + 2)
        best = best_values(value, cost, budget)
        for v, (h, n), limit, most in zip(value, prices, budget, best, strict=True):
            found = solve_two_class(v[:heads], v[heads:], h, n, limit)
            kept_heads, kept_neurons = found.head_mask.sum(), found.neuron_mask.sum()
            assert found.value == v[found.mask].sum() == most
            assert found.cost == kept_heads * h + kept_neurons * n <= limit
            assert np.array_equal(found.head_mask, masked_least(v[:heads], heads - kept_heads))
            assert np.array_equal(
                found.neuron_mask, masked_least(v[heads:], neurons - kept_neurons)
            )
            assert found.upper_bound >= most


def two_class_by_sorting(heads, neurons, head_cost, neuron_cost, budget):
    """Numbers of heads and neurons: every number of heads with all the neurons it leaves."""
    sums = [np.concatenate([[0.0], np.cumsum(np.sort(v)[::-1])]) for v in (heads, neurons)]
    n = np.arange(len(heads) + 1)
    n = n[n * head_cost <= budget]
    f = np.minimum((budget - n * head_cost) // neuron_cost, len(neurons)).astype(int)
    best = np.argmax(sums[0][n] + sums[1][f])  # the first: the fewest heads
    return n[best], f[best]


@pytest.mark.parametrize("values", ["integers", "lognormal", "one binade"])
def test_large_problems_follow_numpy(values):
    """Above the size where values are sorted by bucket, and only where they are asked for."""
    rng = np.random.default_rng(12)
    for heads, neurons, head_cost, neuron_cost in (
        (5000, 40_000, 96, 7),
        (30, 50_000, 1024, 1),
        (50_000, 50_000, 3, 3),
        (20_000, 9, 2, 5),
    ):
        draw = {
            "integers": lambda size: rng.integers(0, 60, size).astype(float),
            "lognormal": lambda size: np.round(rng.lognormal(0, 3, size) * 1024),
            "one binade": lambda size: rng.integers(2**20, 2**20 + 2**14, size).astype(float),
        }[values]
        a, b = draw(heads) * head_cost, draw(neurons) * neuron_cost
        for share in (0.0, 0.001, 0.3, 0.5, 0.97, 1.0):
            budget = int(share * (heads * head_cost + neurons * neuron_cost))
            found = solve_two_class(a, b, head_cost, neuron_cost, budget)
            n, f = two_class_by_sorting(a, b, head_cost, neuron_cost, budget)
            assert (found.head_mask.sum(), found.neuron_mask.sum()) == (n, f)
            assert np.array_equal(found.head_mask, masked_least(a, heads - n))
            assert np.array_equal(found.neuron_mask, masked_least(b, neurons - f))
            assert found.value == a[found.head_mask].sum() + b[found.neuron_mask].sum()


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


def test_inputs_are_left_alone():
    value, cost = np.array([1.0, 3.0, -0.0]), np.array([1.0, 2.0, 1.0])
    value.flags.writeable = cost.flags.writeable = False
    solve_mask(value, cost, 2)
    solve_two_class(value, cost, 1, 1, 2)
    solve_mask(np.array([9, 1, 9, 2, 9])[1::2], np.float32([1, 1]), np.float32(1))
    assert value.tolist() == [1.0, 3.0, 0.0]


def test_no_limit_holds_for_costs_whose_sum_overflows():
    found = solve_two_class((1.0, 2.0), (3.0, 4.0), 1e308, 1e308, np.inf)
    assert found.mask.all()
    assert (found.value, found.cost, found.gap) == (10, np.inf, 0)
    literal = solve_two_class_literal((1.0, 2.0), (3.0, 4.0), 1e308, 1e308, np.inf)
    assert literal.mask.tolist() == [True, True, False, False]  # as printed: all it can pay for
    assert literal.masked_cost == np.inf


def test_a_budget_of_the_largest_float_is_a_limit():
    found = solve_two_class((), (1.0, 3.0, 2.0), 0.0, 1e308, 1.7e308)
    assert (found.mask.tolist(), found.value) == ([False, True, False], 3)


def test_the_printed_algorithm_masks_the_least_of_tiny_values_beside_huge_ones():
    found = solve_two_class_literal((7e306,), (3e-323, 5e-324), 1e308, 1e308, 1e308)
    assert found.mask.tolist() == [True, True, False]
