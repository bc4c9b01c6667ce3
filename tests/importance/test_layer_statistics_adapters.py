import itertools
import math

import numpy as np
import pytest
import torch
from helpers.importance_models import adapted, assert_untouched, batches, plain, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.adapters import adapted_layers
from floe.data.loss import losses
from floe.importance.layer_statistics.adapters import (
    closed_adapters,
    draw_sets,
    forward_selection,
    kl_to_full,
    shapley,
    shapley_values,
)


def row_losses_of(model, rows):
    with torch.no_grad():
        return torch.cat([losses(model, batch, 0)[0] for batch in rows]).double().numpy()


def without_experts(model, layers):
    """A copy in which the layers' adapters are zero: what closing them must equal."""
    other = adapted(dtype=torch.float64).eval()
    other.load_state_dict(model.state_dict())
    for layer in layers:
        for module in adapted_layers(other)[layer].values():
            module.floe_expand["default"].weight.data.zero_()
    return other


@pytest.mark.parametrize("closed", [[], [1], [0, 2], [0, 1, 2]])
def test_closed_adapters_add_nothing_and_open_again(closed):
    model = adapted(dtype=torch.float64).eval()
    before = snapshot(model)
    whole = row_losses_of(model, batches())
    with closed_adapters(model, closed):
        found = row_losses_of(model, batches())
    np.testing.assert_allclose(found, row_losses_of(without_experts(model, closed), batches()))
    assert np.array_equal(row_losses_of(model, batches()), whole)
    assert_untouched(model, before)
    assert not closed or not np.array_equal(found, whole)


def test_closing_is_undone_after_an_error_and_within_another():
    model = adapted(layers=[0, 2]).eval()
    flags = [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")]
    with pytest.raises(RuntimeError, match="stop"), closed_adapters(model, [0]):
        raise RuntimeError("stop")
    with closed_adapters(model, [0]):
        with closed_adapters(model, [0, 2]):
            pass
        assert all(m.disable_adapters for m in adapted_layers(model)[0].values())
        assert not any(m.disable_adapters for m in adapted_layers(model)[2].values())
    after = [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")]
    assert after == flags
    with (
        pytest.raises(ValueError, match=r"must carry adapters to be closed, got \[1\] without"),
        closed_adapters(model, [0, 1]),
    ):
        pass


def logits_at_targets(model, batch):
    """[targets, V] of an unpadded row: position i predicts label i + 1."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    wanted = [t for t in range(1, len(logits)) if batch["labels"][0, t] != -100]
    return logits[[t - 1 for t in wanted]].double().numpy()


@pytest.mark.parametrize("keep", [False, True])
def test_kl_is_its_definition_on_zeroed_adapters(keep):
    model = adapted(dtype=torch.float64).eval()
    found = kl_to_full(model, batches(size=2, keep=keep))
    expected = np.zeros(3)
    for layer in range(3):
        other = without_experts(model, [k for k in range(3) if k != layer])
        for batch in batches(size=1):
            p, q = (softmax(logits_at_targets(m, batch)) for m in (model, other))
            expected[layer] += (p * np.log(p / q)).sum(-1).mean() / 5
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert (found > 0).all()


def softmax(logits):
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def test_a_model_of_one_adapted_layer_is_its_own_restoration():
    found = kl_to_full(adapted(layers=[1], dtype=torch.float64), batches(size=2))
    assert found[1] == pytest.approx(0, abs=1e-12)
    assert found[0] == found[2] > 1e-6  # without adapters: the base model's


def test_forward_selection_opens_what_lowers_the_loss_most():
    model = adapted(dtype=torch.float64).eval()
    places, joined = forward_selection(model, batches(size=2)).values()
    open_, order, expected = [], [], []
    while len(open_) < 3:
        means = {}
        for layer in set(range(3)) - set(open_):
            closed = set(range(3)) - {layer, *open_}
            means[layer] = row_losses_of(without_experts(model, closed), batches()).mean()
        best = min(means, key=means.get)
        open_, expected = [*open_, best], [*expected, means[best]]
    order = np.argsort(places)
    assert order.tolist() == open_
    assert sorted(places) == [1, 2, 3]
    np.testing.assert_allclose(joined[order], expected, rtol=1e-9)
    assert len({round(loss, 6) for loss in expected}) == 3


def test_after_the_last_step_layers_follow_by_what_they_would_have_given():
    model = adapted(dtype=torch.float64).eval()
    first, joined = forward_selection(model, batches(size=2), 1).values()
    alone = [
        row_losses_of(without_experts(model, {0, 1, 2} - {layer}), batches()).mean()
        for layer in range(3)
    ]
    np.testing.assert_allclose(joined, alone, rtol=1e-9)
    assert np.argsort(first).tolist() == np.argsort(alone).tolist()
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        forward_selection(model, batches(size=2), 0)


def test_forward_selection_puts_layers_without_adapters_last():
    places, joined = forward_selection(adapted(layers=[1]), batches(size=2)).values()
    assert places.tolist() == [2, 1, 3]
    assert joined[0] == joined[1] == joined[2]


def brute_force(game, players):
    """Shapley values by the definition: marginal contributions over all orders."""
    values = np.zeros(players)
    for order in itertools.permutations(range(players)):
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            values[player] += game[before | {player}] - game[before]
    return values / math.factorial(players)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_all_sets_give_the_shapley_values_of_any_game(players, seed):
    rng = np.random.default_rng(seed)
    subsets = [
        frozenset(s) for n in range(players + 1) for s in itertools.combinations(range(players), n)
    ]
    game = {subset: rng.normal() for subset in subsets}
    inner = subsets[1:-1]
    sets = np.array([[p in s for p in range(players)] for s in inner]).reshape(-1, players)
    payoffs = np.array([game[s] for s in inner])
    found = shapley_values(sets.astype(bool), payoffs, game[subsets[0]], game[subsets[-1]])
    np.testing.assert_allclose(found, brute_force(game, players), atol=1e-6)


def test_few_sets_are_exact_for_a_game_without_interactions():
    worth = np.array([3.0, -1.0, 0.5, 0.0, 2.0, 1.0, 7.0])
    sets = draw_sets(7, 14, seed=1)
    found = shapley_values(sets, 10 + sets @ worth, 10.0, 10 + worth.sum())
    np.testing.assert_allclose(found, worth, atol=1e-6)
    # and the total is kept whatever the payoffs
    found = shapley_values(sets, np.random.default_rng(0).normal(size=14), 1.0, 5.0)
    assert found.sum() == pytest.approx(4.0)


def test_what_sets_leave_open_is_shared_evenly():
    sets = np.array([[True, False, False], [False, True, True]])
    found = shapley_values(sets, np.array([4.0, 2.0]), 0.0, 6.0)
    np.testing.assert_allclose(found, [4, 1, 1], atol=1e-6)
    # a set without its complement: what no layers give counts, too
    found = shapley_values(sets[:1], np.array([14.0]), 10.0, 16.0)
    np.testing.assert_allclose(found, [4, 1, 1], atol=1e-6)


def test_sets_are_stratified_pairs():
    sets = draw_sets(6, 600, seed=2)
    assert np.bincount(sets.sum(1)).tolist() == [0, 6, 15, 20, 15, 6]  # all there are
    few = draw_sets(20, 40, seed=2)
    assert np.bincount(few.sum(1)).tolist() == [0, *[2] * 9, 4, *[2] * 9]
    assert {tuple(s) for s in few} == {tuple(~s) for s in few}
    assert np.array_equal(draw_sets(6, 6, 2), draw_sets(6, 6, 2))
    assert not np.array_equal(draw_sets(6, 6, 2), draw_sets(6, 6, 3))
    assert draw_sets(1, 2, 0).shape == (0, 1)
    for count in (5, 4, -2):
        with pytest.raises(ValueError, match=f"even number >= 6 for 7 layers, got {count}"):
            draw_sets(7, count, 0)


def test_shapley_of_a_model_over_all_sets():
    model = adapted(dtype=torch.float64).eval()
    before = snapshot(model)
    game = {}
    for n in range(4):
        for chosen in itertools.combinations(range(3), n):
            other = without_experts(model, [k for k in range(3) if k not in chosen])
            game[frozenset(chosen)] = -row_losses_of(other, batches(size=1)).mean()
    # three layers: sizes 1 and 2; 24 draws hold all six sets
    seen = []
    found = shapley(model, batches(size=2), 24, 0, lambda *step: seen.append(step))
    np.testing.assert_allclose(found, brute_force(game, 3), rtol=1e-6)
    assert found.sum() == pytest.approx(game[frozenset(range(3))] - game[frozenset()])
    assert seen == [(n, 3, "shapley") for n in (1, 2, 3)]
    assert_untouched(model, before)


def test_layers_without_adapters_and_models_without_any():
    found = shapley(adapted(layers=[0, 2]), batches(size=2))
    assert found[1] == 0
    assert found[0] != 0
    for measure in (shapley, kl_to_full, forward_selection):
        with pytest.raises(ValueError, match="must carry a warmed-up floe adapter, got none"):
            measure(plain(), batches())


def test_half_precision():
    one, half = (
        kl_to_full(adapted(dtype=d), batches(size=2)) for d in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(half, one, rtol=0.3)
