"""Solvers under odd inputs: refused, or as good as the best of all choices in exact arithmetic."""

import itertools
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.attack import trials

from floe import _native
from floe.selection.masks.determine import PRESETS, determine
from floe.selection.masks.solvers import (
    Units,
    refine_masks,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
)
from floe.selection.placement import Placement, allocate

REFUSALS = (ValueError, TypeError)
LARGEST = np.finfo(np.float64).max
BAD = (math.nan, math.inf, -math.inf, -1.0, -5e-324, LARGEST)
PER_MILLION_MILLION = 10**12  # the solvers' tolerance is one in so many


def exact(number):
    """A float as an integer number of the least positive float."""
    top, bottom = float(number).as_integer_ratio()
    return top * (2**1074 // bottom)


def chosen(numbers, mask):
    return sum(itertools.compress(map(exact, numbers), mask))


def every_mask(units):
    return list(itertools.product((False, True), repeat=units))


class Odd:
    """Random numbers, arrays and budgets; ``good`` says whether all that came were in order."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.good = True

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def numbers(self, count, signed=False):
        rng = self.rng
        style = rng.integers(9)
        if style < 2:
            found = rng.integers(0, 6, count).astype(float)
        elif style == 2:
            found = np.full(count, rng.random())
        elif style == 3:
            found = rng.random(count)
        elif style == 4:  # from the least to the largest
            found = np.ldexp(rng.random(count), rng.integers(-1073, 1017, count))
        elif style == 5:
            found = rng.integers(0, 9, count) * 5e-324
        elif style == 6:
            found = rng.random(count) * 1e307
        elif style == 7:
            found = self.pick(1e-320, 1e-200, 1e200, 1e304) * rng.integers(0, 4, count)
        else:
            found = np.where(rng.random(count) < 0.5, -0.0, rng.lognormal(0, 40, count))
        if signed:
            found = found * rng.choice([-1.0, 1.0], count)
        if count and rng.random() < 0.08:
            found[rng.integers(count)] = self.pick(*BAD)
            self.good = False
        return found

    def array(self, found):
        """The same numbers, kept in another way; or an array that is none of numbers."""
        found = np.asarray(found, dtype=np.float64)
        way = self.rng.integers(40)
        if way == 0:
            return found.astype(">f8")
        if way == 1:
            return np.repeat(found, 2, axis=-1)[..., ::2]
        if way == 2:
            found = found.copy()
            found.flags.writeable = False
            return found
        if way == 3:
            raw = np.zeros(found.nbytes + 1, np.uint8)
            unaligned = raw[1:].view(np.float64).reshape(found.shape)
            unaligned[...] = found
            return unaligned
        if way == 4:
            return found.astype(np.longdouble)
        if way == 5:
            return np.asfortranarray(found)
        if way == 6 and found.size:
            return found.tolist()
        if way > 12:
            return found
        self.good = False
        return self.pick(
            found.astype(complex),
            found > 1,
            np.ma.masked_less(found, 1),
            found.astype(object),
            found.astype(str),
            None,
            found[..., None],
            found.ravel()[:-1],
            np.append(found, 1.0),
            found.astype("m8[s]"),
            "a",
        )

    def budget(self, costs):
        total = float(np.sum(costs[np.isfinite(costs)], dtype=np.longdouble).clip(0, LARGEST))
        some = costs[self.rng.random(costs.shape) < 0.5]
        part = float(np.sum(some[np.isfinite(some)], dtype=np.longdouble).clip(0, LARGEST))
        good = (0, -0.0, 5e-324, math.inf, LARGEST, total, part, total * self.rng.random())
        bad = (-1.0, math.nan, -math.inf, "1", None, True, 10**400, 1j, [1.0])
        if self.rng.random() < 0.06:
            self.good = False
            return self.pick(*bad)
        return self.pick(*good, part, part, good[-1], good[-1])


def sums_fit(*arrays):
    return all(np.abs(array / 2**60).sum() <= 2.0**961 for array in arrays)


def limit_of(budget):
    """What a budget allows with its tolerance, exactly; None = no limit."""
    if math.isinf(budget):
        return None
    return exact(budget) + exact(budget) * 2 // PER_MILLION_MILLION + 1


def fits(cost, limit):
    return limit is None or cost <= limit


def nearly(best):
    return best - 4 * abs(best) // PER_MILLION_MILLION


def attack_solve_mask(odd):
    n = int(odd.rng.integers(0, 8))
    value, cost = odd.numbers(n), odd.numbers(n)
    budget, nodes = odd.budget(cost), odd.pick(0, 4, 10**6)
    odd.good &= sums_fit(value)
    found = solve_mask(odd.array(value), odd.array(cost), budget, max_nodes=nodes)
    if len(found.mask) != n:
        return  # both arrays came longer or shorter
    limit, strict = limit_of(budget), None if math.isinf(budget) else exact(budget)
    best = max(chosen(value, m) for m in every_mask(n) if fits(chosen(cost, m), strict))
    assert fits(chosen(cost, found.mask), limit)
    assert found.value == chosen(value, found.mask) / 2**1074 or found.value == pytest.approx(
        chosen(value, found.mask) / 2**1074, rel=1e-14
    )
    assert exact(found.upper_bound) >= nearly(best)
    assert found.gap >= 0
    if nodes == 10**6:
        assert found.optimal
    if found.optimal:
        assert chosen(value, found.mask) >= nearly(best)


def two_class_choices(heads, neurons, head_cost, neuron_cost, budget):
    """(cost, value) of the n best heads and m best neurons that fit, exactly."""
    heads, neurons = sorted(map(exact, heads))[::-1], sorted(map(exact, neurons))[::-1]
    for n, m in itertools.product(range(len(heads) + 1), range(len(neurons) + 1)):
        cost = n * exact(head_cost) + m * exact(neuron_cost)
        if math.isinf(budget) or cost <= exact(budget):
            yield cost, sum(heads[:n]) + sum(neurons[:m])


def two_class_input(odd):
    h, i = odd.rng.integers(0, 6, 2)
    heads, neurons, costs = odd.numbers(h), odd.numbers(i), odd.numbers(2)
    budget = odd.budget(np.repeat(costs, [h, i]))
    odd.good &= sums_fit(heads) and sums_fit(neurons)
    return heads, neurons, *costs.tolist(), budget


def attack_two_class(odd):
    heads, neurons, head_cost, neuron_cost, budget = two_class_input(odd)
    found = solve_two_class(odd.array(heads), odd.array(neurons), head_cost, neuron_cost, budget)
    if len(found.mask) != len(heads) + len(neurons):
        return  # one array came longer or shorter
    best = max(v for _, v in two_class_choices(heads, neurons, head_cost, neuron_cost, budget))
    value = chosen([*heads, *neurons], found.mask)
    cost = chosen([head_cost] * len(heads) + [neuron_cost] * len(neurons), found.mask)
    unit = (exact(head_cost) + exact(neuron_cost)) // 10**9
    assert math.isinf(budget) or cost <= limit_of(budget) + unit
    assert found.value == pytest.approx(value / 2**1074, rel=1e-14, abs=0)
    assert value >= nearly(best)
    assert exact(found.upper_bound) >= nearly(best)


def attack_two_class_literal(odd):
    heads, neurons, head_cost, neuron_cost, budget = two_class_input(odd)
    found = solve_two_class_literal(
        odd.array(heads), odd.array(neurons), head_cost, neuron_cost, budget
    )
    if len(found.mask) != len(heads) + len(neurons):
        return
    masked = chosen([*heads, *neurons], ~found.mask)
    assert found.masked_value == pytest.approx(masked / 2**1074, rel=1e-14, abs=0)
    least, losses = (sorted(map(exact, heads)), sorted(map(exact, neurons))), {}
    for slack in (0, 2 * 10**-9):
        found_losses = []
        for n in range(len(heads) + 1):
            for m in range(len(neurons), -1, -1):
                cost = n * exact(head_cost) + m * exact(neuron_cost)
                unit = int(slack * 1e9) * (exact(head_cost) + exact(neuron_cost)) // 10**9
                if math.isinf(budget) or cost <= exact(budget) + (
                    slack and exact(budget) * 2 // PER_MILLION_MILLION + unit
                ):
                    found_losses.append(sum(least[0][:n]) + sum(least[1][:m]))
                    break
        losses[slack] = min(found_losses)
    if len(set(losses.values())) == 1:
        assert masked == losses[0] or abs(masked - losses[0]) <= losses[0] // 10**15


def attack_refine(odd):
    layers, heads, neurons = (int(n) for n in odd.rng.integers((0, 0, 0), (4, 3, 4)))
    shapes = [(layers, heads), (layers, neurons)]
    value = [odd.numbers(a * b).reshape(a, b) for a, b in shapes]
    cost = [odd.numbers(a * b).reshape(a, b) for a, b in shapes]
    mask = [odd.rng.random(shape) < 0.6 for shape in shapes]
    values, costs = (np.concatenate([a.ravel() for a in pair]) for pair in (value, cost))
    budget, literal = odd.budget(costs), bool(odd.rng.integers(2))
    pairs = odd.pick("same_layer_cross", "same_layer", "all")
    odd.good &= sums_fit(values) and (budget == math.inf or sums_fit(costs))
    units = Units(*map(odd.array, value), *map(odd.array, cost))
    start = [odd.pick(m, m.astype(np.int8) * 3, m.astype(float)) for m in mask]
    found = refine_masks(units, budget, *start, pairs=pairs, literal=literal)
    kept = np.concatenate([found.head_mask.ravel(), found.neuron_mask.ravel()])
    began = np.concatenate([m.ravel() for m in mask])
    assert found.converged
    assert found.value == pytest.approx(chosen(values, kept) / 2**1074, rel=1e-14, abs=0)
    if literal:
        assert chosen(values, kept) >= chosen(values, began)
        assert nearly(chosen(costs, ~kept)) <= chosen(costs, ~began)
        return
    assert fits(chosen(costs, kept), limit_of(budget))
    strict = None if math.isinf(budget) else exact(budget)
    if fits(chosen(costs, began), strict):
        assert chosen(values, kept) >= chosen(values, began)
    # No single move may be left that gains.
    total, spent = chosen(values, kept), chosen(costs, kept)
    least_gain = 2 * total // PER_MILLION_MILLION + 1
    for i in np.flatnonzero(~kept):
        entering = exact(values[i])
        assert entering <= least_gain or not fits(spent + exact(costs[i]), strict)
        for j in np.flatnonzero(kept) if pairs == "all" else ():
            gain = entering - exact(values[j])
            after = spent + exact(costs[i]) - exact(costs[j])
            assert gain <= least_gain or not fits(after, strict)


def attack_allocate(odd):
    layers, options = (int(n) for n in odd.rng.integers((1, 1), (4, 5)))
    gains = odd.numbers(layers * options, signed=True).reshape(layers, options)
    size = odd.pick(4, 4, 50, 2**45, 2**58, 2**62)
    step = odd.pick(1, 1, 3, 2**10, size // 2)
    costs = odd.rng.integers(0, max(1, size // step), (layers, options)) * step
    cheapest = int(costs.min(1).sum(dtype=object))
    budget = cheapest + int(odd.rng.integers(0, 20)) * step - odd.pick(0, 0, 0, 0, 0, 0, step)
    budget = odd.pick(*[budget] * 20, 2**62, 0, -1, 2.0, 2**64, True)
    wide = (costs.max() - costs.min()) // max(1, math.gcd(*costs.ravel().tolist())) > 10**5
    plain = type(budget) is int and cheapest <= budget < 2**63 and not wide
    odd.good &= plain and int(costs.max()) * layers < 2**61
    odd.good &= bool(np.isfinite(gains).all()) and sums_fit(gains * 2)
    asked = odd.pick(*[costs] * 9, costs.astype(">i8"), costs.astype(np.uint64), costs - 2**61)
    odd.good &= asked.min() >= 0
    pairs = [(j, 1) for j in range(options)]
    scale = odd.pick(1, 1, 1, 2, 10**6, 2**62)
    found = allocate(np.ones(layers), pairs, asked, budget, odd.array(gains), scale=scale)
    sums = {
        index: sum(exact(gains[k][j]) for k, j in enumerate(index))
        for index in itertools.product(range(options), repeat=layers)
        if sum(int(asked[k][j]) for k, j in enumerate(index)) <= budget
    }
    best = max(sums.values())
    slack = sum(exact(row.max()) - exact(row.min()) for row in gains) + abs(best)
    slack = 4 * slack // 10**12
    index = tuple(found.index.tolist())
    assert index in sums
    assert found.cost == sum(int(asked[k][j]) for k, j in enumerate(index)) <= budget
    assert sums[index] >= best - slack or not found.optimal
    assert found.optimal or scale > 1
    rounding = sum(exact(np.abs(row).max()) for row in gains) // 10**14
    assert abs(exact(found.value) - sums[index]) <= rounding
    assert exact(found.upper_bound) >= best - slack - rounding


def attack_modules(odd):
    layers, names = int(odd.rng.integers(0, 4)), ("q", "k", "v")[: odd.rng.integers(0, 4)]
    shape = (layers, len(names))
    scores = odd.numbers(layers * len(names)).reshape(shape)
    sizes = odd.rng.integers(0, odd.pick(4, 10**6, 10**6, 2**35, 2**38, 2**62), shape)
    budget = int(sizes.sum(dtype=object) * odd.rng.random()) + odd.pick(
        0, 0, 0, 0, 0, 1, -1, 2**62, 2**70
    )
    odd.good = False  # how much is allowed has its own test
    modules = {}
    try:
        modules = Placement.of_modules(odd.array(scores), sizes, budget, names).modules
    except ValueError as error:
        if "must pay for a projection of score above 0" not in str(error):
            raise  # else the best is to choose none, which is held below
    taken = [[name in modules.get(layer, ()) for name in names] for layer in range(len(scores))]
    taken = np.array(taken, dtype=bool).reshape(shape)
    assert sum(map(int, sizes[taken])) <= budget
    flat, costs = scores.ravel(), [int(size) for size in sizes.ravel()]
    best = max(
        chosen(flat, m)
        for m in every_mask(len(flat))
        if sum(itertools.compress(costs, m)) <= budget
    )
    assert chosen(flat, np.ravel(taken)) >= nearly(best)


def attack_determine(odd):
    layers, heads, neurons = (int(n) for n in odd.rng.integers((1, 1, 1), (4, 3, 4)))
    names = ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor")
    parts = [odd.numbers(layers * n).reshape(layers, n) for n in (heads, neurons) * 2]
    scores = SimpleNamespace(meta={}, **dict(zip(names, parts, strict=True)))
    preset = odd.pick(*PRESETS)
    fraction = odd.pick(0.3, 0.5, 1.0, 1e-300, 0.0, 2.0, math.nan)
    odd.good &= 0 < fraction <= 1 and sums_fit(*parts)
    found = determine(scores, preset, fraction)
    certificate = found.certificate
    assert all(math.isfinite(certificate[key]) for key in ("value", "cost", "upper_bound", "gap"))
    limit = limit_of(certificate["budget"] * layers)
    unit = 2 * exact(max(np.abs(part).max() for part in parts[2:])) // 10**9
    if PRESETS[preset].objective != "alg1_literal" and PRESETS[preset].cost == "unit":
        kept = np.concatenate([found.head_mask.ravel(), found.neuron_mask.ravel()])
        costs = np.concatenate([parts[2].ravel(), parts[3].ravel()])
        assert chosen(costs, kept) <= limit + unit
    assert certificate["value"] <= certificate["upper_bound"] * (1 + 1e-12)


ATTACKS = {
    attack_solve_mask: 450,
    attack_two_class: 300,
    attack_two_class_literal: 150,
    attack_refine: 350,
    attack_allocate: 350,
    attack_modules: 50,
    attack_determine: 50,
}


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # of the numbers made here
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_odd_inputs_are_refused_or_solved_exactly(attack):
    refused = 0
    for seed in range(trials(ATTACKS[attack])):
        odd, refusal, began = Odd(seed), None, time.monotonic()
        try:
            attack(odd)
        except REFUSALS as error:
            refusal = error
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        assert time.monotonic() - began < 2, seed
        assert refusal is None or (str(refusal) and not odd.good), (seed, refusal)
        refused += refusal is not None
    assert refused < trials(ATTACKS[attack]) * 0.8


def native_call(odd):
    """A native function with arguments that no check of Python's has seen."""
    rng = odd.rng

    def array(*shape):
        if rng.random() < 0.15:
            shape = odd.pick((), (2,), (3,), (6,), (2, 3), (3, 2), (1, 2, 3), (0, 2**40), (0,))
        found = odd.numbers(math.prod(shape), signed=rng.random() < 0.2).reshape(shape)
        return odd.array(found) if rng.random() < 0.3 else found

    def flags():
        shape = odd.pick(*[(6,)] * 12, (2, 3), (3,), (0,))
        return rng.integers(0, 256, shape, np.uint8).view(bool)

    def number():
        return odd.pick(*map(float, odd.numbers(3)), math.inf, math.nan, -1.0, 0.0)

    def whole(*usual):
        if rng.random() < 0.85:
            return odd.pick(*usual)
        return odd.pick(0, 1, 2, -1, 2**30, 2**62, -(2**63), 2**63 - 1)

    costs = odd.pick(rng.integers(0, 5, (2, 3)), rng.integers(-2, 2**60, (2, 3)), array(2, 3))
    progress = odd.pick(*[None] * 9, 3)
    return odd.pick(
        (_native.solve_knapsack, array(6), array(6), number(), whole(10), number(), progress),
        (_native.solve_two_class, array(3), array(6), number(), number(), number(), True),
        (_native.solve_two_class, array(3), array(6), number(), number(), number(), False),
        (
            _native.refine,
            array(6),
            array(6),
            number(),
            flags(),
            whole(2),
            whole(1),
            whole(2),
            odd.pick("all", "same_layer", "same_layer_cross", "?"),
            bool(rng.integers(2)),
            whole(10),
            progress,
        ),
        (_native.allocate, array(2, 3), costs, whole(5, 2**20), progress),
        (_native.allocate_bound, array(2, 3), costs, whole(5, 2**20)),
    )


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_native_functions_hold_without_the_checks_before_them():
    answered = []
    for seed in range(trials(1000)):
        function, *arguments = native_call(Odd(seed))
        try:
            function(*arguments)
            answered.append(function)
        except (*REFUSALS, MemoryError):
            pass
    assert len(answered) > trials(1000) / 10
    assert len(set(answered)) >= 5
