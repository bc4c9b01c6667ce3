import numpy as np
import pytest
import torch
from helpers.importance_models import adapted, assert_untouched, batches, plain, snapshot

from floe.decoder_blocks import find_blocks, linear_at
from floe.importance.layer_statistics.forward import (
    Covariance,
    angles,
    explained_variance,
    last_tokens,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def inputs_of(model, rows, name):
    """Every block's inputs of a projection at real tokens, [n, K] float64, from plain hooks."""
    found = [[] for _ in find_blocks(model)]
    hooks = []
    for block in find_blocks(model):

        def hook(_module, args, into=found[block.index]):
            into.append(args[0].detach())

        hooks.append(linear_at(model, block.linears[name]).register_forward_pre_hook(hook))
    kept = []
    with torch.no_grad():
        for batch in rows:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                  position_ids=batch["position_ids"])  # fmt: skip
            kept.append(batch["attention_mask"].bool())
    for hook in hooks:
        hook.remove()
    pieces = [[x[k].double() for x, k in zip(part, kept, strict=True)] for part in found]
    return [torch.cat(part).numpy() for part in pieces]


@pytest.mark.parametrize(
    ("kind", "side"), [("llama", "left"), ("qwen3", "left"), ("gemma2", "right")]
)
def test_explained_variance_is_that_of_a_principal_component_analysis(kind, side):
    model = plain(kind, dtype=torch.float64)
    found = explained_variance(model, batches(size=2, side=side), ALL, rank=3)
    for column, name in enumerate(ALL):
        for layer, x in enumerate(inputs_of(model, batches(size=2, side=side), name)):
            values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
            expected = values[:3].sum() / values.sum()
            assert found[layer, column] == pytest.approx(expected, abs=1e-9), (name, layer)
    assert (found[:, 0] == found[:, 2]).all()  # q and v read the same


def test_batching_precision_and_rank():
    one = explained_variance(plain(), batches(), ALL, rank=3)
    np.testing.assert_allclose(explained_variance(plain(), batches(size=1), ALL, 3), one, atol=1e-5)
    half = explained_variance(plain(dtype=torch.bfloat16), batches(size=2), ALL, 3)
    np.testing.assert_allclose(half, one, atol=0.02)
    assert (explained_variance(plain(), batches(), ALL, rank=2) < one).all()
    assert explained_variance(plain(), batches(), ALL, rank=99).min() == pytest.approx(1)
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        explained_variance(plain(), batches(), ALL, 0)
    with pytest.raises(ValueError, match=r"projections must be among .*got 'query'"):
        explained_variance(plain(), batches(), ["query"])


def test_adapters_are_off_and_the_model_comes_back():
    model = adapted()
    before = snapshot(model)
    seen = []
    found = explained_variance(model, batches(size=2), ["gate_proj"], 3, lambda *s: seen.append(s))
    assert_untouched(model, before)
    assert seen == [(1, 3, "eva"), (2, 3, "eva"), (3, 3, "eva")]
    np.testing.assert_allclose(
        found, explained_variance(plain(), batches(size=2), ["gate_proj"], 3), rtol=1e-6
    )
    of = angles(model, batches(size=2), ["angular_last"])
    assert_untouched(model, before)
    np.testing.assert_allclose(
        of["angular_last"],
        angles(plain(), batches(size=2), ["angular_last"])["angular_last"],
        atol=1e-6,
    )


def test_covariance_of_pieces_far_from_zero():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 5)) * [3, 1, 1, 0.1, 0] + 1000
    one = Covariance()
    for piece in np.split(vectors, [1, 7, 30]):
        one.add(torch.tensor(piece, dtype=torch.float32))
    values = np.linalg.eigvalsh(np.cov(vectors.astype(np.float32).astype(float).T))[::-1]
    assert one.leading(2) == pytest.approx(values[:2].sum() / values.sum(), rel=1e-5)
    still = Covariance()
    still.add(torch.ones(4, 3))
    assert still.leading(1) == 0


def test_angles_are_those_of_the_hidden_states():
    model = plain(dtype=torch.float64)
    found = angles(model, batches(size=2), ["angular_last", "angular_all"])
    sums = {name: np.zeros((4, 4)) for name in found}
    tokens = rows = 0
    for batch in batches(size=1):  # no padding: the plain definition, pair by pair
        with torch.no_grad():
            out = model(**{k: v for k, v in batch.items() if k != "labels"})
        del out
        states = [x.numpy() for x in hidden_states(model, batch)]
        for i in range(4):
            for j in range(4):
                cosine = (states[i] * states[j]).sum(-1) / (
                    np.linalg.norm(states[i], axis=-1) * np.linalg.norm(states[j], axis=-1)
                )
                angle = np.arccos(np.clip(cosine, -1, 1)) / np.pi * (i != j)
                sums["angular_all"][i, j] += angle.sum()
                sums["angular_last"][i, j] += angle[-1]
        tokens += len(states[0])
        rows += 1
    np.testing.assert_allclose(found["angular_all"], sums["angular_all"] / tokens, atol=1e-9)
    np.testing.assert_allclose(found["angular_last"], sums["angular_last"] / rows, atol=1e-9)
    assert np.diagonal(found["angular_all"]).tolist() == [0, 0, 0, 0]


def hidden_states(model, batch):
    """Inputs of every block and the last one's output, [T, d] of the only row."""
    found = []
    blocks = find_blocks(model)
    hooks = [
        block.module.register_forward_pre_hook(lambda _m, args: found.append(args[0][0]))
        for block in blocks
    ]
    last = []
    hooks.append(blocks[-1].module.register_forward_hook(lambda _m, _a, out: last.append(out)))
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    for hook in hooks:
        hook.remove()
    return [*found, (last[0][0] if isinstance(last[0], tuple) else last[0])[0]]


def test_the_last_real_token_on_either_side():
    real = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    expected = [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert last_tokens(real).int().tolist() == expected
    left = angles(plain(), batches(side="left"), ["angular_last"])["angular_last"]
    right = angles(plain(), batches(side="right"), ["angular_last"])["angular_last"]
    np.testing.assert_allclose(left, right, atol=1e-5)


def test_a_zero_state_is_an_error():
    model = plain()
    model.model.embed_tokens.weight.data.zero_()
    with pytest.raises(ValueError, match="angular_all must be finite, got a zero or infinite"):
        angles(model, batches(), ["angular_all"])


def test_inputs_that_are_not_finite_are_an_error():
    model = plain()
    linear_at(model, find_blocks(model)[1].linears["v_proj"]).weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"inputs of model.layers.1.self_attn.o_proj must be fin"):
        explained_variance(model, batches(), ALL)
