"""The mask solvers as operators: what the numpy interface gives, seen by torch."""

import numpy as np
import pytest
import torch

import floe.ops  # noqa: F401
from floe.selection.masks.solvers import (
    Units,
    refine_masks,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
)

OPS = torch.ops.floe


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("literal", [False, True])
def test_two_classes(seed, literal):
    heads, neurons = draw(seed % 7, seed=seed), draw(11, seed=seed + 100)
    arguments = heads, neurons, 0.3, 0.1, 0.4 + seed / 20
    solve = solve_two_class_literal if literal else solve_two_class
    expected = solve(*arguments)
    head_mask, neuron_mask, totals = OPS.solve_two_class(*arguments, literal)
    assert torch.equal(head_mask, torch.from_numpy(expected.head_mask))
    assert torch.equal(neuron_mask, torch.from_numpy(expected.neuron_mask))
    names = ("value", "cost", "masked_value", "masked_cost", "upper_bound", "lambda_")
    assert totals.tolist() == [getattr(expected, name) for name in names]


@pytest.mark.parametrize("seed", range(20))
def test_a_cost_for_each_unit(seed):
    value, cost = draw(25, seed=seed), draw(25, seed=seed + 100)
    budget = float(cost.sum()) / 3
    expected = solve_mask(value, cost, budget)
    mask, totals = OPS.solve_mask(value, cost, budget)
    assert torch.equal(mask, torch.from_numpy(expected.mask))
    names = ("value", "cost", "masked_value", "masked_cost", "upper_bound", "lambda_")
    names += ("optimal", "nodes")
    assert totals.tolist() == [float(getattr(expected, name)) for name in names]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pairs", ["same_layer_cross", "same_layer", "all"])
def test_refinement(seed, pairs):
    sizes = 3, 4, 6
    units = Units(*(draw(3, n, seed=seed + k).numpy() for k, n in enumerate((4, 6, 4, 6))))
    start = draw(30, seed=seed + 50) < 0.5
    before = start.clone()
    heads, neurons = units.split(start.numpy())
    budget = float(units.cost.sum()) / 2
    expected = refine_masks(units, budget, heads, neurons, pairs=pairs)
    value, cost = torch.from_numpy(units.value), torch.from_numpy(units.cost)
    mask, totals = OPS.refine_masks(value, cost, budget, start, *sizes, pairs)
    both = np.concatenate([expected.head_mask.ravel(), expected.neuron_mask.ravel()])
    assert torch.equal(mask, torch.from_numpy(both))
    names = ("value", "cost", "masked_value", "masked_cost", "repairs", "adds", "swaps")
    assert totals.tolist() == [
        *(float(getattr(expected, name)) for name in names),
        float(expected.converged),
    ]
    assert torch.equal(start, before)


def test_opcheck():
    value, cost = draw(10, seed=1), draw(20, seed=2)[::2]
    torch.library.opcheck(OPS.solve_two_class.default, (value, cost, 0.1, 0.2, 1.0, False))
    torch.library.opcheck(OPS.solve_mask.default, (value, cost, 1.5, 100))
    sizes = 2, 2, 3
    start = value > 0.5
    arguments = value, cost, 1.5, start, *sizes, "all", False, 100
    torch.library.opcheck(OPS.refine_masks.default, arguments)


def test_a_compiled_function_may_solve():
    def count(value, cost):
        return OPS.solve_mask(value * 2, cost, 1.0)[0].sum()

    value, cost = draw(10, seed=1), draw(10, seed=2)
    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert compiled(value, cost) == count(value, cost)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: OPS.solve_mask(v.float(), v, 1.0), RuntimeError, "value must be a float64"),
        (lambda v: OPS.solve_mask(v, v[None], 1.0), RuntimeError, "cost must be a float64 vector"),
        (lambda v: OPS.solve_mask(v, v[1:], 1.0), ValueError, "cost must be as long as value"),
        (lambda v: OPS.solve_mask(v, -v, 1.0), ValueError, r"cost\[0\] must be a finite number"),
        (lambda v: OPS.solve_mask(v, v, -1.0), ValueError, "budget must be a number >= 0, got -1"),
        (lambda v: OPS.solve_mask(v, v, 1.0, -1), RuntimeError, "max_nodes must be >= 0, got -1"),
        (lambda v: OPS.solve_mask(v, v, "1"), RuntimeError, "budget"),
        (lambda v: OPS.solve_mask(v, v, 1.0, 2.5), RuntimeError, "max_nodes"),
        (lambda v: OPS.solve_two_class(v, v, float("nan"), 1.0, 1.0), ValueError, "head_cost"),
        (lambda v: OPS.refine_masks(v, v, 1.0, v, 1, 2, 1), RuntimeError, "mask must be a bool"),
        (lambda v: OPS.refine_masks(v, v, 1.0, v > 0, 1, 2, 1, "x"), ValueError, "got 'x'"),
        (lambda v: OPS.refine_masks(v, v, 1.0, v > 0, 1, 2, 3), ValueError, "must be"),
        (lambda v: OPS.solve_mask(v.requires_grad_(), v, 1.0), RuntimeError, "no derivative"),
    ],
)
def test_what_is_no_problem_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
