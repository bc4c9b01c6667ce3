import itertools
import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe import _native
from floe.selection import placement as allocation
from floe.selection.placement import (
    Saturating,
    allocate,
    fit_gain,
    option_costs,
)

LLAMA_7B_FFN = [(4096, 11008), (4096, 11008), (11008, 4096)]


def solve(gain, cost, budget, **more):
    gain = np.asarray(gain, dtype=float)
    options = [(j, 1) for j in range(gain.shape[1])]
    return allocate(np.ones(len(gain)), options, np.asarray(cost), budget, gain, **more)


def brute_force(gain, cost, budget):
    """(value, -cost, negated index) of the best of all choices; None if none is feasible."""
    layers, options = len(gain), len(gain[0])
    found = None
    for index in itertools.product(range(options), repeat=layers):
        spent = sum(cost[k][j] for k, j in enumerate(index))
        if spent <= budget:
            value = sum(gain[k][j] for k, j in enumerate(index))
            choice = (value, -spent, tuple(-j for j in index))
            found = choice if found is None else max(found, choice)
    return found


@st.composite
def problems(draw):
    layers, options = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    step = draw(st.sampled_from([1, 1, 3, 768]))
    table = st.lists(
        st.lists(st.integers(0, 9), min_size=options, max_size=options),
        min_size=layers,
        max_size=layers,
    )
    cost = [[step * c for c in row] for row in draw(table)]
    return draw(table), cost, draw(st.integers(0, 30 * step))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_allocation_is_the_best_of_all(problem):
    gain, cost, budget = problem
    best = brute_force(gain, cost, budget)
    if best is None:
        with pytest.raises(ValueError, match="the budget must pay for every layer's cheapest"):
            solve(gain, cost, budget)
        return
    found = solve(gain, cost, budget)
    assert (found.value, -found.cost, tuple(-found.index)) == best
    assert found.optimal
    assert found.upper_bound >= found.value
    assert found.cost <= found.budget == budget


def test_six_thousand_allocations_are_the_best_of_all():
    rng = np.random.default_rng(2)
    for layers, options in itertools.product((1, 2, 3, 4), (1, 2, 3, 4)):
        choices = np.array(list(itertools.product(range(options), repeat=layers)))
        layer = np.arange(layers)
        for _ in range(375):
            gain, cost = rng.integers(0, 8, (2, layers, options))
            budget = int(cost.min(1).sum() + rng.integers(0, 16))
            spent = cost[layer, choices].sum(1)
            value = np.where(spent <= budget, gain[layer, choices].sum(1), -1)
            best = np.lexsort((spent, -value))[0]  # stable: the choices ascend
            found = solve(gain, cost, budget)
            assert found.index.tolist() == choices[best].tolist()
            assert found.upper_bound >= found.value == value[best]


@given(problems(), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_a_coarser_unit_stays_feasible_and_says_what_it_may_have_lost(problem, scale):
    gain, cost, budget = problem
    best = brute_force(gain, cost, budget)
    if best is None:
        return
    found = solve(gain, cost, budget, scale=scale)
    assert found.cost == sum(row[j] for row, j in zip(cost, found.index, strict=True)) <= budget
    assert found.value <= best[0] <= found.upper_bound * (1 + 1e-12)
    if found.optimal:
        assert found.value == pytest.approx(best[0], rel=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_larger_allocations_against_numpy(seed):
    """All costs at once, no bound, no pruning; numbers of any size, some of them tied."""
    rng = np.random.default_rng(seed)
    layers, options = 12, 9
    cost = rng.integers(0, 60, (layers, options))
    gain = [rng.random, rng.standard_normal, lambda shape: rng.integers(0, 4, shape) / 2.0][
        seed % 3
    ](cost.shape)
    if seed >= 3:
        gain = cost + gain / 100
    budget = int(cost.min(1).sum() + rng.integers(50, 250))
    rows = np.zeros(budget + 1)
    for k in range(layers)[::-1]:
        row = np.full(budget + 1, -np.inf)
        for c, g in zip(cost[k], gain[k], strict=True):
            row[c:] = np.maximum(row[c:], rows[: budget + 1 - c] + g)
        rows = row
    found = solve(gain, cost, budget)
    assert found.value == pytest.approx(rows[-1], rel=1e-13)
    assert found.cost == np.flatnonzero(rows == rows[-1])[0]
    assert found.value <= found.upper_bound < found.value + gain.max() - gain.min()


def test_ties_go_to_the_least_cost_then_to_the_lower_option_of_the_first_layer():
    assert solve([[1, 1, 1]], [5, 2, 2], 9).index.tolist() == [1]
    assert solve([[0, 1], [0, 1], [0, 1]], [0, 2], 4).index.tolist() == [0, 1, 1]
    assert solve([[0, 3, 1], [0, 1, 3]], [0, 1, 1], 1).index.tolist() == [0, 2]
    found = solve([[5, 5], [5, 5]], [[4, 4], [3, 1]], 8)
    assert (found.index.tolist(), found.cost) == ([0, 1], 5)


def test_what_every_layer_pays_is_no_part_of_the_table():
    found = solve([[1, 2], [1, 2]], [10**12 + 1, 10**12 + 7], 2 * 10**12 + 9)
    assert (found.index.tolist(), found.unit) == ([0, 1], 6)


def test_parameters_of_the_papers_configuration():
    """FLoE on LLaMA2-7B, rank 8 and 4 experts on all FFN projections of 32 layers."""
    costs = option_costs(LLAMA_7B_FFN, [(0, 0), (8, 4), (8, 0), (16, 1)])
    assert costs.tolist()[:3] == [0, 34_111_488 // 32, 0]
    assert costs[3] == 2 * 16 * (4096 + 11008) + 2 * 4096 + 16 * (11008 + 4096) + 11008
    assert costs.dtype == np.int64


def test_a_model_of_the_gain_is_its_formula():
    options = [(0, 0), (8, 4), (2, 1)]
    gains = Saturating(8.0).gains([2.0, 0.0, 1.0], options)
    assert gains.shape == (3, 3)
    assert gains[0].tolist() == pytest.approx(
        [0, 2 * (1 - math.exp(-2)), 2 * (1 - math.exp(-1 / 4))]
    )
    assert not gains[1].any()
    costs = option_costs(LLAMA_7B_FFN, options)
    found = allocate([2.0, 0.0, 1.0], options, costs, int(costs[1] + costs[2]), Saturating(8.0))
    assert found.index.tolist() == [1, 0, 2]
    assert found.unit == math.gcd(*costs.tolist()) == 256 or found.unit % 256 == 0


def test_a_table_too_large_is_an_error_that_names_a_scale(monkeypatch):
    rng = np.random.default_rng(0)
    cost = 3 * rng.integers(1, 10**6, (20, 5))
    gain, budget = rng.random((20, 5)), int(cost.sum() // 10)
    monkeypatch.setattr(allocation, "MAX_TABLE_BYTES", 10**7)
    with pytest.raises(
        ValueError, match=r"20 layers by \d+ steps .* divisor 3\) .* scale="
    ) as error:
        solve(gain, cost, budget)
    scale = int(str(error.value).split("scale=")[1].split()[0])
    coarse = solve(gain, cost, budget, scale=scale)
    monkeypatch.undo()
    exact = solve(gain, cost, budget)
    assert coarse.cost <= budget
    assert coarse.value <= exact.value <= coarse.upper_bound
    assert coarse.value > 0.99 * exact.value
    assert not coarse.optimal or coarse.value == pytest.approx(exact.value)


def test_whole_options_reach_less_than_a_continuous_capacity_and_nearly_as_much():
    rng = np.random.default_rng(1)
    scores, c0, budget = rng.lognormal(0, 1, 24), 8.0, 400
    ranks = np.arange(0, 129)
    gain = np.multiply.outer(scores, np.log1p(ranks / c0))
    whole = allocate(scores, [(int(r), 1) for r in ranks], ranks, budget, gain)
    # Layers fill like connected vessels up to one price, which more layers only lower.
    best = np.sort(scores)[::-1]
    prices = np.cumsum(best) / (budget + c0 * np.arange(1, 25))
    smooth = np.maximum(0.0, scores / prices[best > c0 * prices][-1] - c0)
    assert smooth.sum() == pytest.approx(budget)
    value = (scores * np.log1p(smooth / c0)).sum()
    assert whole.value <= whole.upper_bound <= value * (1 + 1e-12)
    assert whole.value > 0.999 * value
    assert np.abs(whole.index - smooth).max() <= 2


def trials(a, b, r0, noise=0.0, pairs=((2, 1), (4, 1), (4, 4), (8, 4), (16, 4), (32, 8))):
    rng = np.random.default_rng(0)
    return [
        {
            "rank": r,
            "num_experts": m,
            "value": a - b * (1 - math.exp(-r * math.sqrt(m) / r0)) + noise * rng.standard_normal(),
        }
        for r, m in pairs
    ]


@pytest.mark.parametrize("truth", [(2.0, 0.5, 8.0), (1.0, 3.0, 1.5), (0.0, 1e-3, 30.0)])
def test_a_fit_finds_the_model_that_made_the_trials(truth):
    fit = fit_gain(trials(*truth))
    assert fit.r0 == pytest.approx(truth[2], rel=1e-4, abs=1e-6)


def test_a_fit_of_noisy_trials_is_near_the_truth():
    fit = fit_gain(trials(2.0, 0.5, 8.0, noise=0.01))
    assert fit.r0 == pytest.approx(8.0, rel=0.3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param(
            trials(2, 1, 8, pairs=((4, 4), (8, 1), (2, 1))), "at least 3 different", id="few"
        ),
        pytest.param(trials(2, -1, 8), "must fall with capacity", id="rises"),
        pytest.param(trials(2, 1000, 1e5), "straight up to the largest", id="straight"),
        pytest.param(trials(2, 1, 0.01), "must fall with capacity, got 1.0 everywhere", id="flat"),
        pytest.param(
            [
                {"rank": 0, "num_experts": 0, "value": 3.0},
                *({**t, "value": 1.0} for t in trials(2, 1, 8)),
            ],
            "no knee: the loss is flat behind the smallest",
            id="step",
        ),
        pytest.param(
            [*trials(2, 1, 8), {"rank": 1, "num_experts": 1, "value": math.nan}], "finite", id="nan"
        ),
    ],
)
def test_trials_that_cannot_determine_a_fit(rows, message):
    with pytest.raises(ValueError, match=message):
        fit_gain(rows)


def test_allocation_errors():
    good = {"layer_scores": [1, 1], "options": [(0, 0), (1, 1)], "costs": [0, 1], "budget": 1}
    with pytest.raises(ValueError, match=r"layer_scores\[1\] must be a finite number >= 0, got -2"):
        allocate(**{**good, "layer_scores": [1, -2]}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match="at least one layer, got none"):
        allocate(**{**good, "layer_scores": []}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match="at least one pair, got none"):
        allocate(**{**good, "options": []}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match=r"gain must have shape \[L, J\] = \(2, 2\), got \(1, 2\)"):
        allocate(**good, gain=[[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"gain\[1, 1\] must be finite, got nan"):
        allocate(**good, gain=[[1.0, 2.0], [1.0, math.nan]])
    with pytest.raises(TypeError, match="costs must be an array of integers, got dtype float64"):
        allocate(**{**good, "costs": [0.0, 1.0]}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match=r"costs must have shape .* got \(3,\)"):
        allocate(**{**good, "costs": [0, 1, 2]}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match="costs must be >= 0, got -1"):
        allocate(**{**good, "costs": [0, -1]}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match=r"less than 2\*\*61"):
        allocate(**{**good, "costs": [0, 2**61]}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match=r"cheapest option \(2\), got 1"):
        allocate(**{**good, "costs": [1, 1]}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match=r"budget must be in \[0, 2\*\*63\), got -1"):
        allocate(**{**good, "budget": -1}, gain=Saturating(1.0))
    with pytest.raises(ValueError, match="scale must be >= 1, got 0"):
        allocate(**good, gain=Saturating(1.0), scale=0)
    with pytest.raises(ValueError, match="r0 must be > 0 and finite, got 0"):
        Saturating(0)


LONG = """
import signal
import numpy as np
from floe.selection.placement import allocate
signal.signal(signal.SIGINT, signal.default_int_handler)
rng = np.random.default_rng(0)
cost = rng.integers(1, 4000, (60, 300))
options = [(j, 1) for j in range(300)]
print("go", flush=True)
try:
    allocate(np.ones(60), options, cost, 120_000, cost + rng.random(cost.shape) / 100)
    print("ended")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_a_long_allocation():
    with subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "go\n"
        timer = threading.Timer(0.15, os.kill, (child.pid, signal.SIGINT))
        timer.start()
        try:
            assert child.communicate(timeout=60)[0] == "interrupted\n"
        finally:
            timer.cancel()
            child.kill()


def test_progress_counts_layers_and_what_it_raises_cancels():
    rng = np.random.default_rng(0)
    cost = rng.integers(1, 4000, (40, 300))
    gain = cost + rng.random(cost.shape) / 100
    seen = []

    def stop(done):
        seen.append(done)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        _native.allocate(gain, cost, 80_000, stop)
    assert len(seen) == 1
    assert 1 <= seen[0] <= 40


@pytest.mark.parametrize(
    ("gain", "cost", "budget"),
    [
        ([[-1.7e308, 1.7e308]] * 2, [[0, 5]] * 2, 5),
        ([[-1.6e308, -1.5e308]] * 2, [[0, 5]] * 2, 5),
        ([[-1.7e308, -1.0e308, 1e308]] * 3, [[0, 5, 7]] * 3, 12),
    ],
)
def test_gains_whose_sums_overflow_are_refused(gain, cost, budget):
    with pytest.raises(ValueError, match=r"gains must sum to less than 2\*\*1021, got inf"):
        solve(gain, cost, budget)


@pytest.mark.parametrize("size", [1e306, 1e-300, 5e-324])
def test_gains_of_any_size_are_solved(size):
    found = solve(
        np.array([[-3, 1, 9], [0, 2, 5], [0, 2, 4]]) * size,
        [[0, 2, 5], [0, 1, 3], [0, 1, 3]],
        6,
    )
    assert found.index.tolist() == [2, 0, 1]
    assert found.value == pytest.approx(11 * size, rel=1e-14, abs=0)
    assert found.upper_bound == pytest.approx(11 * size, rel=1e-14, abs=0)


def test_gains_small_beside_what_no_choice_can_miss_are_told_apart():
    found = solve([[1e16, -2e16], [-1e16, -2e16], [0.0, 1.0]], [[0, 0]] * 3, 0)
    assert found.index.tolist() == [0, 0, 1]


def test_the_bound_holds_beside_dear_cheapest_options():
    base = 2**58
    found = solve(
        [[0, 3, 5], [0, 4, 5]],
        [[base, base + 2, base + 3], [base, base + 2, base + 3]],
        2 * base + 4,
    )
    assert found.index.tolist() == [1, 1]
    assert found.value == 7
    assert 7 <= found.upper_bound <= 8.5


def test_costs_beyond_64_bits_are_refused():
    with pytest.raises(ValueError, match=r"less than 2\*\*61, got a cost of 18446744073709551615"):
        solve([[0.0, 1.0]], np.array([[0, 2**64 - 1]], np.uint64), 5)
