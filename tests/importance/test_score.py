import warnings

import numpy as np
import pytest
import torch
from helpers.importance_models import (
    Codes,
    adapted,
    assert_untouched,
    batches,
    measure_fisher,
    measure_taylor,
    plain,
    snapshot,
)

import floe
from floe.adapters import adapted_modules
from floe.data.batches import fingerprint, rows_of
from floe.decoder_blocks import find_blocks
from floe.importance.score import fresh_adapters, score


def fingerprint_of(given):
    return fingerprint(rows_of(given))


def test_is_fisher_of_the_adapted_and_taylor_of_the_base_model():
    model = adapted()
    before = snapshot(model)
    scores = floe.score(model, batches(size=2), keep_samples=True, probe=True)
    assert_untouched(model, before)
    fisher = measure_fisher(model, batches(size=2), adapters=True, keep_samples=True)
    taylor = measure_taylor(plain(), batches(size=2))
    assert np.array_equal(scores.head_fisher, fisher.head)
    assert np.array_equal(scores.neuron_fisher, fisher.neuron)
    assert np.array_equal(scores.adapter_fisher, fisher.adapter)
    assert np.array_equal(scores.head_gradient, fisher.head_gradient)
    assert np.array_equal(scores.neuron_gradient, fisher.neuron_gradient)
    assert np.allclose(scores.head_taylor, taylor.head, rtol=1e-6)
    assert np.allclose(scores.neuron_taylor, taylor.neuron, rtol=1e-6)
    assert not np.allclose(scores.probe_fisher, scores.adapter_fisher, rtol=0.1)


def test_meta_says_how_it_was_measured(tmp_path):
    model = adapted(layers=[0, 2])
    with pytest.warns(RuntimeWarning, match=r"adapter_fisher of layers \[1\] is zero"):
        scores = score(model, batches(size=2), taylor_batches=batches(size=3)[:1], seed=7)
    meta = scores.meta
    assert (meta["rows"], meta["tokens"], meta["taylor_rows"], meta["taylor_tokens"]) == (
        5,
        15,
        3,
        18,
    )
    assert meta["data"] == fingerprint_of(batches())
    assert meta["taylor_data"] == fingerprint_of(batches(size=3)[:1])
    assert (meta["taylor_from_calibration"], meta["taylor_kind"], meta["base_quantised"]) == (
        False,
        "element",
        False,
    )
    assert (meta["reduction"], meta["mask_scope"], meta["seed"]) == ("sample", "base", 7)
    assert (meta["taylor_aggregate"], meta["taylor_loss"], meta["model"]) == (
        "abs_of_mean",
        "all",
        "llama",
    )
    per_layer = 2 * (5 * 32 + 2 * 3 * 40) + 5 * 40 + 2 * 3 * 32
    assert meta["adapter_parameters"] == [per_layer, 0, per_layer]
    trainable = sum(p.numel() for n, p in model.named_parameters() if "floe_" in n)
    assert sum(meta["adapter_parameters"]) == trainable
    assert scores.adapter_fisher[1] == 0
    assert set(meta["versions"]) == {"floe", "torch", "transformers", "peft", "numpy"}
    scores.save(tmp_path / "s.npz")
    assert floe.Scores.load(tmp_path / "s.npz").meta == meta


def test_options_reach_their_measurement():
    model = adapted()
    plain_scores = score(model, batches(size=2))
    changed = score(
        model,
        batches(size=2),
        reduction="batch",
        mask_scope="full",
        taylor_kind="vector",
        taylor_aggregate="mean_of_abs",
        taylor_tokens="response",
    )
    assert changed.head_fisher.shape == changed.head_taylor.shape == (3, 4)
    fisher = measure_fisher(model, batches(size=2), reduction="batch", scope="full")
    assert np.array_equal(changed.neuron_fisher, fisher.neuron)
    taylor = measure_taylor(
        model, batches(size=2), kind="vector", aggregate="mean_of_abs", tokens="response"
    )
    assert np.array_equal(changed.neuron_taylor, taylor.neuron)
    assert np.allclose(changed.adapter_fisher, plain_scores.adapter_fisher, rtol=1e-5)
    assert changed.probe_fisher is None
    assert changed.head_gradient is None


def test_probe_is_the_fisher_of_freshly_drawn_adapters():
    model = adapted()
    probe = score(model, batches(size=2), probe=True, seed=3).probe_fisher
    again = score(model, batches(size=1), probe=True, seed=3).probe_fisher
    other = score(model, batches(size=2), probe=True, seed=4).probe_fisher
    assert np.array_equal(probe, again)
    assert not np.allclose(probe, other, rtol=1e-3)
    with fresh_adapters(model, 3):
        alone = measure_fisher(model, batches(size=2), scope="full", masks=False, adapters=True)
        assert np.array_equal(probe, alone.adapter)


def test_fresh_adapters_start_as_new_ones_and_come_back():
    trained, new = adapted(), adapted(seed=11)
    before = snapshot(trained)
    with fresh_adapters(trained, 11):
        for path, module in adapted_modules(trained).items():
            assert torch.equal(
                module.floe_shrink["default"].weight,
                adapted_modules(new)[path].floe_shrink["default"].weight,
            )
            assert not module.floe_expand["default"].weight.any()
    assert_untouched(trained, before)
    with pytest.raises(RuntimeError, match="stop"), fresh_adapters(trained, 11):
        raise RuntimeError("stop")
    assert_untouched(trained, before)


def test_fingerprint_depends_on_rows_and_order_alone():
    expected = fingerprint_of(batches())
    for same in (
        batches(size=1),
        batches(size=2),
        batches(side="right"),
        batches(size=2, keep=True),
    ):
        assert fingerprint_of(same) == expected
    assert fingerprint_of(batches(size=1)[::-1]) != expected
    for name in ("input_ids", "labels"):
        (batch,) = batches()
        batch[name] = batch[name].clone()
        batch[name][1, -1] += 1
        assert fingerprint_of([batch]) != expected


def test_scores_without_adapters_and_without_signal():
    with pytest.raises(ValueError, match="model must carry floe adapters"):
        score(plain(), batches())
    model = adapted()
    for module in adapted_modules(model).values():
        module.floe_expand["default"].weight.data.zero_()
        module.floe_shrink["default"].weight.data[: module.settings["default"].rank] = 0
    with pytest.warns(RuntimeWarning, match="adapter_fisher is zero for every unit of every layer"):
        score(model, batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        score(adapted(), batches())


def test_progress_names_what_is_done():
    seen = []
    score(
        adapted(),
        batches(size=2),
        probe=True,
        progress=lambda done, total, what: seen.append((what, done, total)),
    )
    assert [s for s in seen if s[0] != "taylor"] == [("fisher", 5, 5), ("probe", 5, 5)]
    assert [s[1:] for s in seen if s[0] == "taylor"] == [(i, 4) for i in range(1, 5)]


def test_an_error_midway_leaves_the_model_as_it_was():
    model = adapted()
    before = snapshot(model)
    bad = batches(size=2)
    bad[1]["labels"][:] = -100
    with pytest.raises(ValueError, match="row 2 must have at least one label"):
        score(model, bad)
    assert_untouched(model, before)


def test_a_quantised_base_is_scored_by_its_masks_and_says_so():
    model = adapted()
    for block in find_blocks(model):
        block.module.mlp.up_proj.base_layer = Codes(block.module.mlp.up_proj.base_layer)
    with pytest.warns(RuntimeWarning, match="taylor_kind is 'vector', not 'element': quantised"):
        scores = score(model, batches(size=2))
    meta = scores.meta
    assert (meta["taylor_kind"], meta["taylor_kind_asked"]) == ("vector", "element")
    assert meta["base_quantised"]
    assert (scores.neuron_taylor > 0).all()


def test_without_taylor_rows_the_first_32_are_taken():
    lengths = [(5 + n % 4, 1 + n % 2) for n in range(40)]
    given = batches(lengths, size=7)
    scores = score(adapted(), given)
    assert (scores.meta["rows"], scores.meta["taylor_rows"]) == (40, 32)
    assert scores.meta["taylor_from_calibration"]
    first = measure_taylor(
        adapted(), batches([(5 + n % 4, 1 + n % 2) for n in range(40)], size=32)[:1]
    )
    assert np.array_equal(scores.neuron_taylor, first.neuron)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": torch.zeros(1, 9, dtype=torch.long)}, "labels .* got \\(1, 9\\)"),
        ({"labels": torch.zeros(4, 5, dtype=torch.long)}, "labels .* only with logits_to_keep"),
        ({"labels": torch.zeros(4, 12, dtype=torch.long)}, "labels .* got \\(4, 12\\)"),
        ({"labels": torch.zeros(4, 9)}, "labels .* one whole number a token"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]] * 4)}, "one run of tokens"),
    ],
)
def test_batches_that_would_be_read_otherwise_are_refused(change, text):
    ids = torch.arange(3, 39).view(4, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} | change
    with pytest.raises(ValueError, match=text):
        score(adapted(), [batch])
