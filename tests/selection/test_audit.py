"""The audit of hand-made scores: against definitions, with known answers, bit by bit."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.audit_cases import NEURONS, H, K, L, S, light, make, named, run

import floe
from floe.artifacts.audit import Likeness, Spread
from floe.errors import FileError
from floe.importance.scores import LayerStatistics
from floe.selection.audit import audit
from floe.selection.comparison import (
    SPLITS,
    Options,
    Rows,
    agreement_of,
    bootstrap_weights,
    compare_policies,
    likeness,
    names,
    ranked,
    score_layers,
    spread,
)
from floe.selection.masks.determine import PRESETS, determine
from floe.selection.policies import POLICIES
from floe.selection.policies.registry import policy
from floe.selection.select import select


@pytest.fixture(scope="module")
def found():
    return run(make())


# what is compared


def test_every_preset_and_every_policy_but_all_is_compared_or_listed(found):
    compared = {one.name for one in found.policies}
    assert compared | set(found.lacking) == set(names())
    assert not compared & set(found.lacking)
    assert set(names()) == {f"masks/{p}" for p in PRESETS} | set(POLICIES) - {"masks", "all"}
    assert set(found.lacking) == {"probe", *(p for p in POLICIES if POLICIES[p].statistics)}


@pytest.mark.parametrize("name", ["adapter_fisher", "fisher_low", "even", "random", "segment"])
def test_policies_rank_as_select_does(found, name):
    chosen = select(make(), policy=name, layers=K, seed=3)
    one = named(found.policies, name)
    assert (one.layers, one.ranking) == (chosen.layers, chosen.ranking)
    assert one.scores == tuple(chosen.layer_scores)


def test_a_policy_may_look_at_the_paper_s_masks():
    @policy(score="the opposite of the masks")
    def by_masks(inputs):
        return -inputs.mask_scores

    try:
        chosen = select(make(), policy="by_masks", layers=K)
        assert np.array_equal(score_layers("by_masks", make(), Options(K)), chosen.layer_scores)
        assert len(set(chosen.layer_scores)) > 1
    finally:
        del POLICIES["by_masks"]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("score", ["soft", "path"])
def test_presets_rank_as_select_does(preset, score):
    options = Options(K, budget=0.4, score=score)
    chosen = select(make(), policy="masks", preset=preset, layers=K, budget=0.4, score=score)
    got = score_layers(f"masks/{preset}", make(), options)
    assert np.array_equal(got, chosen.layer_scores)


def test_what_lacks_inputs_says_how_to_get_them():
    scores = make(keep=False, gate_gradient=None)
    found = run(scores)
    assert "probe=True" in found.lacking["probe"]
    assert "score the model again" in found.lacking["gate_fisher_diagonal"]
    assert "--statistics shapley" in found.lacking["shapley"]
    assert found.masks is None
    assert "keep_samples: true" in found.not_resampled["masks/global"]
    assert "even" not in found.not_resampled


def test_statistics_bring_their_policies():
    values = {"lamp_kept": np.linspace(0, 1, L), "shapley": -np.arange(L, dtype=np.float64)}
    found = run(light(), statistics=LayerStatistics(L, values))
    assert named(found.policies, "lamp").layers == (4, 5)
    assert named(found.policies, "shapley").layers == (0, 1)
    assert "angular" in found.lacking


def test_agreement_is_that_of_every_pair():
    one = ranked("a", np.array([5.0, 4, 3, 2, 1, 0]), 2)
    other = ranked("b", np.array([4.0, 5, 0, 1, 2, 3]), 2)
    level = ranked("c", np.ones(6), 2)
    found = agreement_of((one, other, level))
    d = np.array([0, 1, 2, 3, 4, 5]) - np.array([1, 0, 5, 4, 3, 2])
    assert found.spearman[0][1] == pytest.approx(1 - 6 * (d**2).sum() / (6 * 35))
    assert found.spearman[0][0] == 1
    assert found.spearman[2] == (None, None, None)
    assert found.overlap == ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert found.expected_overlap == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("scores", "tied"),
    [([3, 2, 1, 0], 0), ([3, 2, 2, 0], 2), ([2, 2, 1, 0], 0), ([1, 1, 1, 1], 4), ([3, 1, 1, 1], 3)],
)
def test_ties_at_the_end_of_the_choice_are_counted(scores, tied):
    assert ranked("x", np.array(scores, dtype=float), 2).tied == tied


# rows


@pytest.mark.parametrize("name", ["adapter_fisher", "gate_fisher_diagonal", "masks/exact"])
def test_reweighted_scores_are_those_of_repeated_rows(name):
    scores = make()
    weights = bootstrap_weights(S, 20, seed=1)
    rows = Rows.of(scores)
    for weight, got in zip(weights, rows.reweighted(weights), strict=True):
        index = np.repeat(np.arange(S), weight.astype(int))
        taken = {key: array[index] for key, array in rows.arrays.items()}
        want = replace(
            scores,
            **taken,
            adapter_fisher=taken["adapter_samples"].sum(axis=0),
            head_fisher=np.square(taken["head_gradient"], dtype=np.float64).sum(axis=0),
            neuron_fisher=np.square(taken["neuron_gradient"], dtype=np.float64).sum(axis=0),
        )
        options = Options(K)
        np.testing.assert_allclose(
            score_layers(name, got, options), score_layers(name, want, options), rtol=1e-6
        )


def test_bootstrap_draws_as_many_rows_as_there_are():
    weights = bootstrap_weights(S, 500, seed=5)
    assert (weights.sum(axis=1) == S).all()
    assert np.array_equal(weights, bootstrap_weights(S, 500, seed=5))
    assert not np.array_equal(weights, bootstrap_weights(S, 500, seed=6))
    assert weights.mean(axis=0) == pytest.approx(np.ones(S), abs=0.25)
    assert weights.var() == pytest.approx(1 - 1 / S, rel=0.05)  # of a binomial count


def test_permuting_the_rows_leaves_the_audit(found):
    scores = make()
    order = np.random.default_rng(9).permutation(S)
    names = ("adapter_samples", "gate_gradient", "head_gradient", "neuron_gradient")
    moved = replace(scores, **{name: getattr(scores, name)[order] for name in names})
    assert run(moved).document() == found.document()


def test_one_seed_gives_one_audit_bit_by_bit(found, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(make(), seed=seed).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_layers_with_all_the_fisher_are_always_chosen():
    level = np.array([1e-9, 1, 1e-9, 1e-9, 1, 1e-9])
    found = run(make(levels=level))
    for name in ("adapter_fisher", "gate_fisher_diagonal", "fisher_high"):
        one = named(found.bootstrap, name)
        assert [one.probability[k] for k in (1, 4)] == [1, 1], name
        assert sum(one.probability) == pytest.approx(K)
        assert (one.same, one.kept) == (1, 1)
        assert max(one.rank_high[1], one.rank_high[4]) <= K
        assert min(one.rank_low[k] for k in (0, 2, 3, 5)) > K
        parts = named(found.subsets, name)
        assert parts.halves.overlap == Spread(K, K, K)
    assert any("same 2 layers in 100%" in text for text in found.verdicts["solid"])


def test_one_row_with_everything_makes_a_choice_that_does_not_reproduce():
    samples = np.ones((S, L)) + np.arange(L) * 1e-3
    samples[7, 0] = 100
    scores = light(adapter_samples=samples, adapter_fisher=samples.sum(axis=0))
    found = run(scores, bootstrap=400)
    one = named(found.bootstrap, "adapter_fisher")
    there = 1 - (1 - 1 / S) ** S  # the row is drawn at all
    assert one.probability[0] == pytest.approx(there, abs=0.07)
    assert one.probability[L - 1] == 1
    assert one.same == pytest.approx(there, abs=0.07)
    assert named(found.subsets, "adapter_fisher").halves.overlap.mean == 1
    (text,) = [text for text in found.verdicts["open"] if "whole choice" in text]
    assert "20 rows do not separate layer 0 from layer 4" in text
    assert any("(5)" in text for text in found.verdicts["solid"])


def test_constant_scores_are_named_as_ties():
    level = light(adapter_samples=np.ones((S, L)), adapter_fisher=np.full(L, float(S)))
    found = run(level)
    assert named(found.policies, "adapter_fisher").tied == L
    assert any(
        "index alone" in text and "adapter_fisher" in text for text in found.verdicts["open"]
    )
    assert named(found.bootstrap, "adapter_fisher").spearman is None
    place = found.agreement.names.index("adapter_fisher")
    assert set(found.agreement.spearman[place]) == {None}


def test_parts_are_nested_and_end_with_all_rows(found):
    for part in found.subsets:
        assert part.rows == (6, 10, 14, 20)
        assert part.against_all[-1].overlap == Spread(K, K, K)
        assert part.against_all[-1].spearman.mean == pytest.approx(1, abs=1e-9), part.name
        assert part.against_all[0].overlap.mean <= K
    resampled = {one.name for one in found.subsets}
    assert resampled == {one.name for one in found.bootstrap}
    assert resampled == {
        "masks/global",
        "masks/exact",
        "masks/paper_layer",
        "masks/alg1_literal",
        "adapter_fisher",
        "gate_fisher_diagonal",
        "fisher_high",
        "fisher_low",
        "segment",
    }


def test_halves_are_disjoint():
    """Every row speaks for one layer alone: halves that shared rows would share layers."""
    samples = np.zeros((L, L))
    np.fill_diagonal(samples, 1.0)
    scores = light(adapter_samples=samples, adapter_fisher=samples.sum(axis=0))
    found = run(scores, layers=3)
    assert named(found.subsets, "adapter_fisher").halves.overlap.mean == 0


def test_fisher_information_that_is_no_sum_over_rows_is_not_resampled():
    found = run(make(meta={"reduction": "batch"}))
    assert "batch" in found.not_resampled["masks/global"]
    assert {one.name for one in found.bootstrap} == {
        "adapter_fisher",
        "gate_fisher_diagonal",
        "segment",
    }


@pytest.mark.parametrize(("rows", "layers"), [(1, 1), (2, L), (3, 1)])
def test_few_rows_and_every_layer(rows, layers):
    whole = make()
    names = ("adapter_samples", "gate_gradient", "head_gradient", "neuron_gradient")
    scores = replace(whole, **{name: getattr(whole, name)[:rows] for name in names})
    found = run(scores, layers=layers, bootstrap=2)
    found.document()
    for one in found.bootstrap:
        assert sum(one.probability) == pytest.approx(layers)
        assert one.same == 1 or layers == 1
    assert found.agreement.expected_overlap == pytest.approx(layers**2 / L)


def test_spreads():
    assert spread([None, None]) == Spread(None, None, None)
    assert spread([None, 3.0]) == Spread(3, 3, 3)
    values = list(range(101))
    assert spread(values) == Spread(50, 5, 95)
    same = ranked("x", np.arange(4.0), 2)
    assert likeness([(same, same)]) == Likeness(Spread(1, 1, 1), Spread(2, 2, 2))


# chance, budgets, pairs


def test_the_null_is_that_of_random_orders(found):
    overlaps = [len({0, 1} & set(pair)) for pair in itertools.permutations(range(L), K)]
    assert found.null.overlap.mean == pytest.approx(np.mean(overlaps), abs=0.15)
    assert found.null.spearman.mean == pytest.approx(0, abs=0.15)
    assert found.null.spearman.low < -0.3 < 0.3 < found.null.spearman.high


def test_budgets_compare_each_preset_with_itself(found):
    assert [one.name for one in found.budgets] == [f"masks/{p}" for p in PRESETS]
    for one in found.budgets:
        assert one.overlap[one.budgets.index(0.5)] == K
        preset = one.name.removeprefix("masks/")
        for budget, layers in zip(one.budgets, one.layers, strict=True):
            chosen = select(make(), policy="masks", preset=preset, budget=budget, layers=K)
            assert layers == chosen.layers
    assert run(light(), score="path").budgets == ()


def test_masked_units_cost_together_what_their_summed_gradients_say():
    scores = make()
    found = run(scores).masks
    masks = determine(scores, "global", 0.5)
    masked, diagonal, block = 0, 0.0, 0.0
    for kind in ("head", "neuron"):
        gradient = getattr(scores, f"{kind}_gradient").astype(np.float64)
        closed = ~getattr(masks, f"{kind}_mask")
        masked += closed.sum()
        diagonal += getattr(scores, f"{kind}_fisher")[closed].sum()
        for k, ones in enumerate(closed):
            matrix = gradient[:, k].T @ gradient[:, k]  # Fisher information of the layer's units
            block += ones @ matrix @ ones
    assert found.masked == masked > 0
    assert found.diagonal_loss == pytest.approx(diagonal)
    assert found.block_loss == pytest.approx(block)
    assert not np.isclose(diagonal, block, rtol=0.01)


def test_units_that_pull_alike_or_against_each_other():
    """Two equal neurons cost twice as much together as one by one, two opposite ones nothing."""
    row = np.ones(S, np.float32)
    for sign, ratio in ((1, 2), (-1, 0)):
        neurons = np.zeros((S, L, NEURONS), np.float32)
        neurons[:, 0, 0], neurons[:, 0, 1] = row, sign * row
        scores = make(
            neuron_gradient=neurons,
            neuron_fisher=np.square(neurons, dtype=float).sum(axis=0),
            head_gradient=np.zeros((S, L, H), np.float32),
            head_fisher=np.zeros((L, H)),
        )
        found = run(scores, budget=1e-6).masks
        assert found.masked >= L * NEURONS
        assert found.block_loss == pytest.approx(ratio * found.diagonal_loss)


# use


def test_the_document_is_plain_and_versioned(found, tmp_path):
    found.save(tmp_path / "audit.json")
    document = json.loads((tmp_path / "audit.json").read_text())
    assert document == found.document()
    assert document["format"] == 1
    assert document["lacking"].keys() == found.lacking.keys()
    with pytest.raises(FileError, match="cannot be written"):
        found.save(tmp_path / "none" / "audit.json")


def test_progress_ends_at_its_total():
    told = []
    run(make(), progress=lambda *step: told.append(step))
    done = [step[0] for step in told]
    assert done == sorted(done)
    assert done[-1] == told[-1][1] == 9 * (30 + SPLITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bootstrap": 0}, "bootstrap must be >= 1, got 0"),
        ({"layers": 9}, r"layers must be in \[1, 6\], got 9"),
        ({"policy": "best"}, "policy must be one of"),
        ({"policy": "masks"}, "policy must be one of"),
        ({"policy": "probe"}, "policy 'probe' needs scores.probe_fisher"),
        ({"budget": 0.0}, r"budget must be a fraction in \(0, 1\]"),
        ({"score": "best"}, "score must be one of"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(light(), **changes)


def test_it_is_public():
    assert floe.audit is audit
    results, _ = compare_policies(make(), Options(K))
    assert {one.name for one in results} <= set(names())
