import numpy as np
import pytest
import torch

from floe.importance import taylor
from floe.importance.taylor import WeightCost


def cost_of(weight, pairs, by_column=False, per_row=False):
    cost = WeightCost(weight, by_column, per_row)
    for x, grad_y in pairs:
        cost.add(x, grad_y)
    return cost


def as_product(gradient):
    """Inputs and output gradients whose product is the given weight gradient."""
    return torch.eye(gradient.shape[1]), gradient.T.contiguous()


def test_worked_example():
    w, g = torch.tensor([[1.0, -2], [3, 0.5]]), torch.tensor([[0.2, 0.1], [-0.1, 0.4]])
    assert cost_of(w, [as_product(g)]).cost().tolist() == pytest.approx([0.4, 0.5])
    assert cost_of(w, [as_product(g)], by_column=True).cost().tolist() == pytest.approx([0.5, 0.4])


@pytest.mark.parametrize("per_row", [False, True])
def test_opposite_rows_cancel_only_before_the_absolute_value(per_row):
    w, g = torch.tensor([[1.0, -2], [3, 0.5]]), torch.tensor([[0.2, 0.1], [-0.1, 0.4]])
    pairs = [as_product(g), as_product(-g)]
    found = cost_of(w, pairs, per_row=per_row).cost() / 2
    assert found.tolist() == pytest.approx([0.4, 0.5] if per_row else [0.0, 0.0])


def rows(counts, features=6, outputs=300, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(outputs, features, generator=generator)
    pairs = [
        (
            torch.randn(n, features, generator=generator).to(dtype),
            torch.randn(n, outputs, generator=generator).to(dtype),
        )
        for n in counts
    ]
    return weight.to(dtype), pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("counts", [[2, 1], [40, 3, 50], [1]])
def test_kept_rows_and_accumulated_products_agree_with_float64(counts, by_column, dtype):
    weight, pairs = rows(counts, dtype=dtype)
    gradient = sum(g.double().T @ x.double() for x, g in pairs)
    expected = (weight.double() * gradient).abs().sum(0 if by_column else 1)
    cost = cost_of(weight, pairs, by_column)
    assert (cost._product is None) == (sum(counts) < 10)
    found = cost.cost()
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-5 * expected.max()


def test_no_product_is_stored_where_the_rows_take_less_room():
    weight, pairs = rows([2, 1])
    held = sum(t.nbytes for pair in pairs for t in pair)
    assert held < weight.numel() * 4
    cost = cost_of(weight, pairs)
    assert cost._product is None
    assert sum(t.nbytes for t in (*cost._inputs, *cost._gradients)) == held
    per_row = cost_of(weight, pairs, per_row=True)
    assert (per_row._inputs, per_row._product) == ([], None)


def test_a_tile_is_a_part_of_the_whole(monkeypatch):
    weight, pairs = rows([2, 1])
    whole = [cost_of(weight, pairs, by_column).cost() for by_column in (False, True)]
    monkeypatch.setattr(taylor, "TILE_ROWS", 7)
    tiled = [cost_of(weight, pairs, by_column).cost() for by_column in (False, True)]
    for one, other in zip(whole, tiled, strict=True):
        assert np.allclose(one, other, rtol=1e-6, atol=0)
