import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from floe.selection.masks.determine import (
    BUDGET_PATH,
    PRESETS,
    budget_path_of,
    determine,
    masked_shares,
    path_score,
)


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        head_fisher=rng.lognormal(0, 1, (5, 4)),
        neuron_fisher=rng.lognormal(0, 1, (5, 30)),
        head_taylor=rng.lognormal(0, 1, (5, 4)),
        neuron_taylor=rng.lognormal(0, 1, (5, 30)),
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_it_is_the_mean_masked_share(scores, name):
    found = masked_shares(scores, name)
    assert budget_path_of(BUDGET_PATH[::-1]) == BUDGET_PATH == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    shares = np.zeros(5)
    for row, budget in enumerate(BUDGET_PATH):
        masks = determine(scores, name, budget)
        share = (~masks.head_mask).mean(axis=1) / 2 + (~masks.neuron_mask).mean(axis=1) / 2
        assert found[row] == pytest.approx(share)
        shares += share
    assert path_score(scores, name) == pytest.approx(shares / 7)


def test_one_budget_is_that_budgets_share(scores):
    one = path_score(scores, PRESETS["exact"], [0.4]).tolist()
    assert one == masked_shares(scores, PRESETS["exact"], [0.4])[0].tolist()
    assert masked_shares(scores, "exact", [0.6, 0.4])[0].tolist() == one


def test_more_budget_masks_less(scores):
    shares = masked_shares(scores, dataclasses.replace(PRESETS["global"], refine="none"))
    assert (np.diff(shares.sum(axis=1)) <= 0).all()


@pytest.mark.parametrize("path", [[], [0.5, 0.5]])
def test_budgets_are_given_once(scores, path):
    with pytest.raises(ValueError, match="budget_path must hold budgets, each once"):
        path_score(scores, budgets=path)


def test_budgets_are_fractions(scores):
    with pytest.raises(ValueError, match="budget must be a fraction"):
        path_score(scores, budgets=[0.5, 1.5])
    with pytest.raises(TypeError, match="budget_path must be a number"):
        path_score(scores, budgets=["0.5"])
