import numpy as np
import pytest
import torch
from helpers.importance_models import (
    KINDS,
    Codes,
    adapted,
    assert_untouched,
    batches,
    mean_nll,
    measure_taylor,
    plain,
    snapshot,
)

from floe.data.loss import all_token_labels, base_only
from floe.decoder_blocks import Geometry, find_blocks, geometry, linear_at
from floe.importance.gradients import Capture
from floe.importance.taylor import unit_costs

ONE_HEAD = Geometry(layers=1, heads=4, kv_heads=2, head_dim=1, neurons=2, hidden=2)


def test_worked_example_of_shared_key_value_heads():
    parts = {
        "q": [1.0, 2, 3, 4],
        "o": [0.5, 0.5, 1, 1],
        "k": [2.0, 4],
        "v": [2.0, 0],
        "gate": [1.0, 2],
        "up": [3.0, 4],
        "down": [5.0, 6],
    }
    parts = {name: np.array(values) for name, values in parts.items()}
    head, neuron = unit_costs(parts, ONE_HEAD)
    assert head.tolist() == [3.5, 4.5, 6.0, 7.0]
    assert neuron.tolist() == [9.0, 12.0]
    fused = {"qkv": np.concatenate([parts[n] for n in "qkv"]), "o": parts["o"]}
    fused |= {"gate_up": np.array([1.0, 2, 3, 4]), "down": parts["down"]}
    assert unit_costs(fused, ONE_HEAD)[0].tolist() == head.tolist()
    assert unit_costs(fused, ONE_HEAD)[1].tolist() == neuron.tolist()


def reference(model, found, aggregate="abs_of_mean", tokens="all"):
    """All weight gradients at once by plain autograd, then |w g| summed unit by unit."""
    model.eval().requires_grad_(True)
    blocks, sizes = find_blocks(model), geometry(model)
    rows = sum(len(b["input_ids"]) for b in found)
    gradients = []
    with base_only(model):
        model.requires_grad_(True)
        for batch in found:
            labels = all_token_labels(batch) if tokens == "all" else batch["labels"]
            batch = {k: v for k, v in batch.items() if k != "logits_to_keep"} | {"labels": labels}
            size = len(labels)
            loss = sum(
                mean_nll(model, {k: v[s : s + 1] for k, v in batch.items()}) for s in range(size)
            )
            model.zero_grad()
            loss.backward()
            gradients.append(
                {
                    p: linear_at(model, p).weight.grad.double() / rows
                    for b in blocks
                    for p in b.linears.values()
                }
            )
    if aggregate == "abs_of_mean":
        gradients = [{p: sum(g[p] for g in gradients) for p in gradients[0]}]
    head, neuron = (
        torch.zeros(len(blocks), sizes.heads).double(),
        torch.zeros(len(blocks), sizes.neurons).double(),
    )
    dim, group = sizes.head_dim, sizes.heads // sizes.kv_heads
    for k, block in enumerate(blocks):
        for g in gradients:
            cost = {
                n: (linear_at(model, p).weight.detach() * g[p]).abs()
                for n, p in block.linears.items()
            }
            if "qkv_proj" in cost:
                sizes_ = [sizes.heads * dim, sizes.kv_heads * dim, sizes.kv_heads * dim]
                cost["q_proj"], cost["k_proj"], cost["v_proj"] = cost["qkv_proj"].split(sizes_)
                cost["gate_proj"], cost["up_proj"] = cost["gate_up_proj"].split(sizes.neurons)
            for h in range(sizes.heads):
                own, shared = (
                    slice(h * dim, (h + 1) * dim),
                    slice(h // group * dim, (h // group + 1) * dim),
                )
                head[k, h] += cost["q_proj"][own].sum() + cost["o_proj"][:, own].sum()
                head[k, h] += (cost["k_proj"][shared].sum() + cost["v_proj"][shared].sum()) / group
            for j in range(sizes.neurons):
                neuron[k, j] += (
                    cost["gate_proj"][j].sum()
                    + cost["up_proj"][j].sum()
                    + cost["down_proj"][:, j].sum()
                )
    return head.numpy(), neuron.numpy()


def close(found, expected, rtol=1e-5):
    assert abs(found - expected).max() <= rtol * abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_autograd(kind):
    result = measure_taylor(plain(kind), batches(size=2))
    head, neuron = reference(plain(kind), batches(size=2))
    close(result.head, head)
    close(result.neuron, neuron)
    assert (result.rows, result.tokens, result.kind, result.quantised) == (5, 27, "element", False)


def test_mean_of_abs_and_response_tokens():
    for aggregate, tokens in (("mean_of_abs", "all"), ("abs_of_mean", "response")):
        result = measure_taylor(plain(), batches(size=2), aggregate=aggregate, tokens=tokens)
        head, neuron = reference(plain(), batches(size=1), aggregate, tokens)
        close(result.head, head)
        close(result.neuron, neuron)
    keep = measure_taylor(plain(), batches(size=2, keep=True), tokens="response")
    close(keep.neuron, neuron)


def test_adapters_are_off_and_nothing_changes():
    model = adapted()
    before = snapshot(model)
    result = measure_taylor(model, batches(size=2))
    vector = measure_taylor(model, batches(size=2), kind="vector")
    assert_untouched(model, before)
    base = measure_taylor(plain(), batches(size=2))
    close(result.head, base.head, 1e-6)
    close(result.neuron, base.neuron, 1e-6)
    close(vector.neuron, measure_taylor(plain(), batches(size=2), kind="vector").neuron, 1e-6)


def test_trainable_base_parameters_stay_trainable():
    model = plain().train()
    before = snapshot(model)
    measure_taylor(model, batches())
    measure_taylor(model, batches(), kind="vector")
    assert_untouched(model, before)


def test_batch_size():
    one, five = (measure_taylor(plain(), batches(size=size)) for size in (1, 5))
    assert np.array_equal(one.head, five.head)
    assert np.array_equal(one.neuron, five.neuron)


def test_vector_is_the_mean_mask_gradient_of_the_base():
    model = adapted()
    with Capture(plain(), tokens="all") as capture:
        found = capture.step(batches()[0])
    result = measure_taylor(model, batches(size=2), kind="vector")
    close(result.head, abs(found.head.mean(0)))
    close(result.neuron, abs(found.neuron.mean(0)))
    each = measure_taylor(model, batches(size=2), kind="vector", aggregate="mean_of_abs")
    close(each.neuron, abs(found.neuron).mean(0))


def test_vector_of_a_down_column_is_its_signed_sum():
    """sum_i w_ij g_ij over a down column is neuron j's mask gradient: no weight gradient needed."""
    model = plain().eval()
    down = find_blocks(model)[1].module.mlp.down_proj
    batch = batches()[0]
    labels = all_token_labels(batch)
    rows = [{k: v[s : s + 1] for k, v in (batch | {"labels": labels}).items()} for s in range(5)]
    (gradient,) = torch.autograd.grad(sum(mean_nll(model, row) for row in rows) / 5, [down.weight])
    expected = (gradient * down.weight).sum(0).abs().detach().numpy()
    close(measure_taylor(plain(), [batch], kind="vector").neuron[1], expected)


def test_quantised_weights_use_the_vector_kind():
    model = plain()
    for block in find_blocks(model):
        block.module.mlp.up_proj = Codes(block.module.mlp.up_proj)
    result = measure_taylor(model, batches(size=2), kind="element")
    assert (result.kind, result.quantised) == ("vector", True)
    assert result.neuron.min() > 0


def test_bfloat16_products_are_summed_in_float32():
    result = measure_taylor(plain(dtype=torch.bfloat16), batches(size=1))
    exact = measure_taylor(plain(dtype=torch.bfloat16).float(), batches(size=1))
    assert abs(result.neuron - exact.neuron).max() < 0.1 * exact.neuron.max()


def test_progress_counts_every_step():
    seen = []
    measure_taylor(plain(), batches(size=2), progress=lambda *a: seen.append(a))
    assert seen == [(i, 4, "taylor") for i in range(1, 5)]  # one pass, three blocks


def test_non_finite_cost_is_named():
    model = plain()
    with torch.no_grad():
        find_blocks(model)[1].module.mlp.up_proj.weight[3] = 1e30
        find_blocks(model)[1].module.mlp.down_proj.weight[:, 3] = 1e30
    with pytest.raises(ValueError, match=r"must (be|have a) finite"):
        measure_taylor(model, batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "x"}, r"kind must be one of \('element', 'vector'\), got 'x'"),
        ({"aggregate": "x"}, "aggregate must be one of"),
        ({"tokens": "x"}, "tokens must be"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        measure_taylor(plain(), batches(), **options)


def test_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        measure_taylor(plain(), [])
