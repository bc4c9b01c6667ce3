import numpy as np
import pytest
import torch
from helpers.importance_models import adapted, assert_untouched, batches, plain, snapshot

from floe.adapters import adapted_layers
from floe.data.loss import losses
from floe.decoder_blocks import find_blocks
from floe.importance.layer_statistics.gradients import RIDGE, gradient_norm, layer_card
from floe.importance.score import fresh_adapters


def rows_summed(model, rows):
    """Loss of all rows, one forward a row."""
    return sum(losses(model, batch, 0)[0].sum() for batch in rows)


def test_gradient_norm_is_autograds_over_all_rows():
    model = adapted(dtype=torch.float64).eval()
    found = gradient_norm(model, batches(size=2), seed=3)
    with fresh_adapters(model, 3):
        for p in model.parameters():
            p.requires_grad_(False)
        parameters = {
            layer: [p for m in modules.values() for p in m.floe_expand.parameters()]
            for layer, modules in adapted_layers(model).items()
        }
        shrink = [p for m in adapted_layers(model)[1].values() for p in m.floe_shrink.parameters()]
        every = [p for own in parameters.values() for p in own]
        for p in [*every, *shrink]:
            p.requires_grad_(True)
        rows_summed(model, batches(size=1)).backward()
        for layer, own in parameters.items():
            expected = sum(float(p.grad.square().sum()) for p in own) ** 0.5
            assert found[layer] == pytest.approx(expected, rel=1e-9)
        assert all(not p.grad.any() for p in shrink)  # B = 0: nothing reaches A and the router


def test_gradient_norm_by_the_closed_form():
    """s ||dY^T (gate * h)|| from a module's input and the gradient of its output."""
    model = adapted(dtype=torch.float64, targets=["down_proj"]).eval()
    found = gradient_norm(model, batches(), seed=3)
    with fresh_adapters(model, 3):
        (module,) = adapted_layers(model)[2].values()
        seen = {}

        def keep(_module, args, output):
            seen["x"], seen["y"] = args[0].detach(), output
            output.retain_grad()

        hook = module.register_forward_hook(keep)
        for p in model.parameters():
            p.requires_grad_(True)
        rows_summed(model, batches()).backward()
        hook.remove()
        x, dy = seen["x"].flatten(0, 1), seen["y"].grad.flatten(0, 1)
        products = x @ module.floe_shrink["default"].weight.T
        hidden, gate = products[:, :3], torch.softmax(products[:, 3:], -1)
        routed = (gate[:, :, None] * hidden[:, None, :]).flatten(1)
        expected = module.settings["default"].scaling * (dy.T @ routed).norm()
    assert found[2] == pytest.approx(float(expected.detach()), rel=1e-9)


def test_opposite_rows_cancel_and_batching_does_not_matter():
    model = adapted(dtype=torch.float64)
    one = gradient_norm(model, batches(size=5))
    np.testing.assert_allclose(gradient_norm(model, batches(size=1)), one, rtol=1e-9)
    rows = batches(size=1)
    parts = np.array([gradient_norm(model, [row]) for row in rows])
    assert (one < parts.sum(0)).all()
    assert not np.allclose(np.square(one), np.square(parts).sum(0), rtol=0.01)


def test_gradient_norm_leaves_the_model_and_needs_adapters():
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype=dtype, layers=[0, 2])
        before = snapshot(model)
        seen = []
        found = gradient_norm(model, batches(size=2), 41, lambda *s, into=seen: into.append(s))
        assert_untouched(model, before)
        assert seen[-1] == (3, 3, "gradient_norm")
        assert found[1] == 0
        assert found[0] > 0
        assert found[2] > 0
    with pytest.raises(ValueError, match=r"must carry floe adapters .*got none"):
        gradient_norm(plain(), batches())


def plain_card(model, rows):
    """The definition: gradients of d x d adapters that hooks add beside every block."""
    blocks = find_blocks(model)
    adapters = [torch.zeros(32, 32, dtype=torch.float64, requires_grad=True) for _ in blocks]
    inputs = [[] for _ in blocks]

    def beside(index):
        def hook(_module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            inputs[index].append(x[0].detach())
            hidden = output[0] if isinstance(output, tuple) else output
            moved = hidden + x.detach() @ adapters[index].T
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    hooks = [b.module.register_forward_hook(beside(b.index), with_kwargs=True) for b in blocks]
    (rows_summed(model, rows) / len(rows)).backward()
    for hook in hooks:
        hook.remove()
    normalised, energy = [], []
    for gradient, xs in zip(adapters, inputs, strict=True):
        x = torch.cat(xs).numpy()
        moment = x.T @ x / len(x)
        values, vectors = np.linalg.eigh(moment)
        values = values.clip(0) + RIDGE * np.trace(moment) / 32
        normalised.append(gradient.grad.numpy() @ vectors @ np.diag(values**-0.5) @ vectors.T)
        energy.append(np.trace(moment))
    return normalised, energy


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_layer_card_is_that_of_linear_adapters_beside_the_blocks(kind):
    model = plain(kind, dtype=torch.float64)
    found = layer_card(model, batches(size=2))
    normalised, energy = plain_card(model, batches(size=1))
    norms = [np.linalg.norm(g) for g in normalised]
    np.testing.assert_allclose(found["residual_norm"], norms, rtol=1e-5)  # kept in float32
    np.testing.assert_allclose(found["activation_energy"], energy, rtol=1e-9)
    for i in range(3):
        for j in range(3):
            cosine = abs((normalised[i] * normalised[j]).sum()) / norms[i] / norms[j]
            assert found["coupling"][i, j] == pytest.approx(cosine, abs=1e-5)
    assert np.diagonal(found["coupling"]).tolist() == [1, 1, 1]


def test_layer_card_looks_at_the_base_model_and_leaves_it():
    model = adapted()
    before = snapshot(model)
    seen = []
    found = layer_card(model, batches(size=2), lambda *step: seen.append(step))
    assert_untouched(model, before)
    assert seen == [(n, 3, "layer_card") for n in (1, 2, 3)]
    of_plain = layer_card(plain(), batches(size=2))
    for name, values in found.items():
        np.testing.assert_allclose(values, of_plain[name], rtol=1e-4)
    half = layer_card(plain(dtype=torch.bfloat16), batches(size=2))
    np.testing.assert_allclose(half["activation_energy"], found["activation_energy"], rtol=0.02)
    np.testing.assert_allclose(half["residual_norm"], found["residual_norm"], rtol=0.1)


def test_gradients_that_are_not_finite_are_an_error():
    model = plain()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"must be finite|must have a finite loss"):
        layer_card(model, batches())
