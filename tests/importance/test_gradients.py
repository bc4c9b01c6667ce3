import pytest
import torch
from helpers.importance_models import (
    KINDS,
    adapted,
    assert_untouched,
    batches,
    mean_nll,
    measure_fisher,
    plain,
    snapshot,
)

from floe import ops
from floe.adapters import separate_base
from floe.data.loss import all_token_labels
from floe.decoder_blocks import base_of, find_blocks, geometry, linear_at
from floe.importance.gradients import Capture

O = torch.tensor([[[1, 2, 0, 1], [3, 0, 1, 1]], [[1, 1, 2, 0], [9, 9, 9, 9]]]).float()  # noqa: E741
G = torch.tensor([[[0.5, -1, 1, 2], [1, 0, -1, 1]], [[2, -1, 0, 3], [7, 7, 7, 7]]])
REAL = torch.tensor([[True, True], [True, False]])


def loop(model, batch, scope, loss_of=None):
    """Explicit mask parameters, one row at a time: the definition of the mask gradient."""
    model.eval()
    blocks, sizes = find_blocks(model), geometry(model)
    sites = [
        (b, path, u)
        for b in blocks
        for path, u in ((b.o_proj, sizes.heads), (b.down_proj, sizes.neurons))
    ]
    rows = []
    for s in range(len(batch["input_ids"])):
        masks = [
            torch.ones(u, dtype=linear_at(model, path).weight.dtype, requires_grad=True)
            for _, path, u in sites
        ]
        hooks = []
        for (_, path, units), mask in zip(sites, masks, strict=True):
            module = (
                linear_at(model, path) if scope == "base" else base_of(model).get_submodule(path)
            )
            width = linear_at(model, path).in_features // units
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _m, a, m=mask, w=width: (a[0] * m.repeat_interleave(w),)
                )
            )
        with separate_base(model):
            row = {k: v[s : s + 1] for k, v in batch.items() if isinstance(v, torch.Tensor)}
            loss = (loss_of or mean_nll)(model, row)
            grads = torch.autograd.grad(loss, masks)
        for hook in hooks:
            hook.remove()
        rows.append((torch.stack(grads[0::2]), torch.stack(grads[1::2])))
    return torch.stack([r[0] for r in rows]).double(), torch.stack([r[1] for r in rows]).double()


def close(found, expected, rtol=1e-5):
    found = torch.as_tensor(found)
    assert (found - expected).abs().max() <= rtol * expected.abs().max()
    assert expected.abs().max() > 0


@pytest.mark.parametrize("scope", ["base", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_explicit_masks(kind, scope):
    model = adapted(kind)
    (batch,) = batches()
    with Capture(model, scope=scope) as capture:
        found = capture.step(batch)
    head, neuron = loop(model, batch, scope)
    close(found.head, head)
    close(found.neuron, neuron)
    assert found.tokens.tolist() == [4, 2, 3, 1, 5]


def test_scopes_differ_where_the_adapter_sits():
    model = adapted(targets=["o_proj", "down_proj"])
    (batch,) = batches()
    with Capture(model, scope="base") as capture:
        base = capture.step(batch)
    with Capture(model, scope="full") as capture:
        full = capture.step(batch)
    for scope, found in (("base", base), ("full", full)):
        head, neuron = loop(model, batch, scope)
        close(found.head, head)
        close(found.neuron, neuron)
    assert abs(base.head - full.head).max() > 1e-2 * abs(base.head).max()
    assert abs(base.neuron - full.neuron).max() > 1e-2 * abs(base.neuron).max()


def test_plain_model_and_all_token_loss():
    model = plain("qwen3")
    (batch,) = batches()
    with Capture(model, tokens="all") as capture:
        found = capture.step(batch)
    head, neuron = loop(model, batch | {"labels": all_token_labels(batch)}, "base")
    close(found.head, head)
    close(found.neuron, neuron)
    assert found.tokens.tolist() == [8, 4, 6, 2, 7]  # a row's first token is predicted from nothing


def test_all_token_labels_ignore_padding_on_either_side():
    for side in ("left", "right"):
        (batch,) = batches(((3, 1), (5, 1)), side=side)
        labels = all_token_labels(batch)
        assert (labels != -100).sum(1).tolist() == [2, 4]
        real = batch["attention_mask"].bool()
        assert (labels[real] != -100).tolist() == [False, True, True, False, True, True, True, True]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_padding_side_and_batching_change_nothing(kind):
    model = adapted(kind)
    (together,) = batches()
    with Capture(model, adapters=True) as capture:
        expected = capture.step(together)
        others = [batches(side="right"), batches(size=1), batches(size=2, keep=True)]
        for other in others:
            parts = [capture.step(batch) for batch in other]
            for name in ("head", "neuron", "adapter"):
                found = torch.cat([torch.as_tensor(getattr(p, name)) for p in parts])
                close(found, torch.as_tensor(getattr(expected, name)))


def test_float64_rows_agree_to_rounding():
    model = adapted(dtype=torch.float64)
    with Capture(model) as capture:
        together = [capture.step(b) for b in batches()]
        apart = [capture.step(b) for b in batches(size=1)]
    found = torch.cat([torch.as_tensor(p.neuron) for p in apart])
    close(
        found, torch.as_tensor(together[0].neuron), rtol=1e-6
    )  # norms and softmax stay float32 in transformers


def test_gradient_of_the_batch_mean_is_rescaled_by_token_counts():
    """A row's share of the batch's token mean, times T_batch / T_n, is the row's own loss."""
    model = adapted()
    (batch,) = batches()
    counts = (batch["labels"] != -100).sum(1)

    def share_of_batch_loss(model, row):
        return mean_nll(model, row) * (row["labels"] != -100).sum() / counts.sum()

    head, _ = loop(model, batch, "base", share_of_batch_loss)
    with Capture(model) as capture:
        found = capture.step(batch)
    close(found.head, head * (counts.sum() / counts)[:, None, None])


def test_worked_example():
    capture = Capture(plain())
    capture._mask = REAL
    capture._take_mask("head", 0, 2, O, G)
    assert capture._gradients["head", 0].tolist() == [[1.5, 2.0], [1.0, 0.0]]
    unmasked = ops.mask_gradients(O, G, 2)
    assert unmasked.square().sum(0).tolist() == [16131.25, 15880.0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_nothing(reentrant):
    model = adapted()
    (batch,) = batches()
    with Capture(model, adapters=True) as capture:
        expected = capture.step(batch)
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    calls = []
    hook = find_blocks(model)[0].module.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with Capture(model, adapters=True) as capture:
        found = capture.step(batch)
    hook.remove()
    assert len(calls) == 2
    for name in ("head", "neuron", "adapter"):
        close(getattr(found, name), torch.as_tensor(getattr(expected, name)))


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_nothing_of_the_model_changes(kind):
    model = adapted(kind)
    before = snapshot(model)
    with Capture(model, adapters=True) as capture:
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
        capture.step(batches()[0])
        assert all(p.grad is None for p in model.parameters())
    assert_untouched(model, before)


def test_an_error_leaves_the_model_as_it_was():
    model = adapted()
    before = snapshot(model)
    (batch,) = batches()
    unlabelled = batch | {"labels": batch["labels"].clone()}
    unlabelled["labels"][2] = -100
    message = r"row 7 must have at least one label, got 0\.0 nats over 0 tokens"
    with pytest.raises(ValueError, match=message):
        measure_fisher(model, [batch, unlabelled])
    assert_untouched(model, before)


def test_missing_labels():
    (batch,) = batches()
    del batch["labels"]
    with pytest.raises(ValueError, match='must hold "labels"'), Capture(plain()) as capture:
        capture.step(batch)


def test_non_finite_loss_names_the_row():
    model = plain()
    (batch,) = batches()
    model.lm_head.weight.data[int(batch["input_ids"][3, -1])] = float("nan")
    with (
        pytest.raises(ValueError, match=r"row \d must have a finite loss, got nan"),
        Capture(model) as capture,
    ):
        capture.step(batch)


def test_non_finite_gradient_names_unit_layer_and_row():
    model = plain()
    down = find_blocks(model)[1].module.mlp.down_proj
    hook = down.register_full_backward_hook(
        lambda _m, grads, _o: (grads[0].index_fill(2, torch.tensor([6]), float("inf")),)
    )
    message = "mask gradient of neuron 6 in layer 1 must be finite, got .* for row 0"
    with pytest.raises(ValueError, match=message), Capture(model) as capture:
        capture.step(batches()[0])
    hook.remove()


def test_padding_may_hold_anything():
    """Padded positions of a site hold NaN: masked by selection, not by multiplication with zero."""
    broken_o, broken_g = O.clone(), G.clone()
    broken_o[1, 1], broken_g[1, 1] = float("nan"), float("inf")
    assert ops.mask_gradients(broken_o, broken_g, 2, REAL).tolist() == [[1.5, 2.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "half"}, r"scope must be one of \('base', 'full'\), got 'half'"),
        ({"masks": False}, "masks or adapters must be True"),
        ({"adapters": True}, "model must carry floe adapters"),
        ({"tokens": "prompt"}, 'tokens must be "response" or "all"'),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message), Capture(plain(), **options) as capture:
        capture.step(batches()[0])
