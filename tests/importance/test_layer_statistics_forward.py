import numpy as np
import pytest
import torch
from helpers.importance_models import adapted, assert_untouched, batches, plain, snapshot

from floe.data.loss import losses
from floe.decoder_blocks import find_blocks, linear_at
from floe.importance.layer_statistics.forward import (
    DISTURBANCE,
    Covariance,
    angles,
    error_growth,
    explained_variance,
    forward_states,
    last_tokens,
    starting_at,
    zeroth_order,
)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "phi3"])
def test_a_forward_can_start_at_any_block(kind):
    model = plain(kind).eval()
    blocks = find_blocks(model)
    batch = batches()[0]
    before = snapshot(model)
    with torch.no_grad():
        states = forward_states(model, batch)
        whole, _ = losses(model, batch, 0)
        assert torch.equal(states.loss, whole.double())
        for layer in range(len(blocks) + 1):
            calls = []
            hooks = [
                linear_at(model, b.down_proj).register_forward_hook(
                    lambda *_, index=b.index, into=calls: into.append(index)
                )
                for b in blocks
            ]
            with starting_at(blocks, layer, states):
                again, _ = losses(model, batch, 0)
            for hook in hooks:
                hook.remove()
            assert calls == list(range(layer, len(blocks)))
            assert torch.equal(again, whole)
            moved = states.before(layer).clone()
            moved += 1.0
            if layer < len(blocks):
                states.calls[layer].hidden, own = moved, states.before(layer)
                with starting_at(blocks, layer, states):
                    other, _ = losses(model, batch, 0)
                states.calls[layer].hidden = own
                assert not torch.equal(other, whole) or layer == 0
    assert_untouched(model, before)
    assert not any("forward" in vars(block.module) for block in blocks)


def test_an_own_forward_of_a_block_comes_back():
    model = plain().eval()
    blocks = find_blocks(model)
    own = vars(blocks[0].module)["forward"] = blocks[0].module.forward
    with torch.no_grad():
        states = forward_states(model, batches()[0])
    with pytest.raises(RuntimeError, match="stop"), starting_at(blocks, 2, states):
        raise RuntimeError("stop")
    assert vars(blocks[0].module)["forward"] == own
    assert "forward" not in vars(blocks[1].module)


def scale_outputs(model, factor):
    for block in find_blocks(model):
        for path in (block.o_proj, block.down_proj):
            linear_at(model, path).weight.data.mul_(factor)


def test_an_error_passes_blocks_that_do_nothing_unchanged():
    model = plain(attention_bias=False)
    scale_outputs(model, 0.0)
    np.testing.assert_allclose(error_growth(model, batches(size=2)), 1, rtol=1e-4)


def test_error_growth_is_that_of_a_disturbed_forward():
    """The definition with hooks on a whole forward, in float64, unpadded rows one by one."""
    model = plain(dtype=torch.float64)
    found = error_growth(model, batches(size=1), seed=7)
    total, tokens = np.zeros(3), 0
    for place, batch in enumerate(batches(size=1)):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        tokens += batch["input_ids"].numel()
        clean = last_output(model, inputs)
        for block in find_blocks(model):
            key = (7, place, block.index)
            state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
            noise = torch.randn(
                clean.shape, generator=torch.Generator().manual_seed(int(state) >> 1)
            ).double()
            noise = noise / noise.norm(dim=-1, keepdim=True) * 0.1

            def disturb(_m, _a, out, noise=noise):
                hidden = out[0] if isinstance(out, tuple) else out
                moved = hidden + noise * hidden.norm(dim=-1, keepdim=True)
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            hook = block.module.register_forward_hook(disturb)
            moved = last_output(model, inputs)
            hook.remove()
            ratio = (moved - clean).norm(dim=-1) / clean.norm(dim=-1)
            total[block.index] += float(ratio.sum()) / DISTURBANCE
    np.testing.assert_allclose(found, total / tokens, rtol=1e-5)
    assert found[-1] == pytest.approx(1, rel=1e-5)
    assert len(set(np.round(found, 3))) == 3


def last_output(model, inputs):
    kept = []
    hook = find_blocks(model)[-1].module.register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    hook.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def test_error_growth_follows_its_seed_and_leaves_the_model():
    model = adapted()
    before = snapshot(model)
    seen = []
    found = error_growth(model, batches(size=2), 3, lambda *step: seen.append(step))
    assert_untouched(model, before)
    assert seen == [(n, 3, "error_propagation") for n in (1, 2, 3)]
    assert np.array_equal(found, error_growth(plain(), batches(size=2), 3))
    assert not np.array_equal(found, error_growth(plain(), batches(size=2), 4))
    half = error_growth(plain(dtype=torch.bfloat16), batches(size=2), 3)
    np.testing.assert_allclose(half, found, rtol=0.1)


def test_zeroth_order_tends_to_the_norm_of_the_gradient():
    model = plain(dtype=torch.float64)
    batch = batches()[0]
    loss, _ = losses(model, batch, 0)
    loss.mean().backward()
    expected = []
    for block in find_blocks(model):
        weights = [linear_at(model, p).weight for p in block.linears.values()]
        norm = sum(float(w.detach().square().sum()) for w in weights) ** 0.5
        expected.append(norm * sum(float(w.grad.square().sum()) for w in weights) ** 0.5)
    model.zero_grad()
    probes = 60
    found = zeroth_order(model, batches(size=5), probes=probes)
    # a squared normal: its mean has a relative deviation of sqrt(2 / probes), its root half that
    np.testing.assert_allclose(found, expected, rtol=4 * 0.5 * (2 / probes) ** 0.5)


def test_zeroth_order_puts_every_bit_back():
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype=dtype)
        before = snapshot(model)
        found = zeroth_order(model, batches(size=2), seed=5, probes=2)
        assert_untouched(model, before)
        assert np.array_equal(found, zeroth_order(plain(dtype=dtype), batches(size=2), 5, 2))
        assert not np.array_equal(found, zeroth_order(model, batches(size=2), 6, 2))
        assert (found > 0).all()
    with pytest.raises(ValueError, match="probes must be >= 1, got 0"):
        zeroth_order(model, batches(), probes=0)


def test_weights_come_back_when_a_forward_fails():
    model = plain()
    before = snapshot(model)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("stop")

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        zeroth_order(model, batches())
    hook.remove()
    assert_untouched(model, before)


def test_slopes_of_batches_add_up():
    whole = zeroth_order(plain(dtype=torch.float64), batches(), seed=2)
    parts = zeroth_order(plain(dtype=torch.float64), batches(size=2), seed=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


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
            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
            )
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
