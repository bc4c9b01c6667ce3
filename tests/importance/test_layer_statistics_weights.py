import numpy as np
import pytest
import torch
from helpers.importance_models import assert_untouched, plain, snapshot

from floe.decoder_blocks import find_blocks, linear_at
from floe.importance.layer_statistics.weights import (
    lamp_kept,
    lamp_scores,
    marchenko_pastur_median,
    projections,
    signal_share,
)


def weights_of(model):
    blocks = find_blocks(model)
    return [[linear_at(model, p).weight.detach() for p in b.linears.values()] for b in blocks]


def test_median_of_the_law_is_that_of_noise():
    rng = np.random.default_rng(0)
    for rows, columns in ((600, 600), (300, 900)):
        noise = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        found = np.median(np.linalg.svd(noise, compute_uv=False) ** 2)
        assert marchenko_pastur_median(rows / columns) == pytest.approx(found, rel=0.02)
    assert marchenko_pastur_median(1e-4) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        marchenko_pastur_median(0)


def test_planted_directions_are_the_signal_of_noisy_weights():
    model = plain(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    torch.manual_seed(0)
    expected = []
    for layer, block in enumerate(weights_of(model)):
        expected.append([])
        for weight in block:
            noise = torch.randn_like(weight)
            left, _, right = torch.linalg.svd(noise, full_matrices=False)
            spikes = torch.zeros(min(weight.shape))
            spikes[:layer] = 100.0  # none in layer 0, one in layer 1
            weight.copy_(0.01 * (noise + left * spikes @ right))
            values = np.linalg.svd(weight.numpy().astype(float), compute_uv=False)
            expected[-1].append(values[:layer].sum() / values.sum())
    found = signal_share(model)
    assert found.shape == (2, 7)
    # The edge is that of infinite matrices: the largest of a small one may just pass it
    assert found[0].max() < 0.06
    np.testing.assert_allclose(found[1], expected[1], atol=0.06)
    assert found[1].min() > 0.1


def test_share_of_a_matrix_by_hand():
    model = plain(hidden_size=32, intermediate_size=40, num_hidden_layers=1)
    for weight in weights_of(model)[0]:
        weight.zero_()
    q = weights_of(model)[0][0]
    q.copy_(torch.eye(32))
    q[0, 0] = 3.0
    # median 1; edge = 1 / sqrt(median of the square law) * 2 > 2, below 3
    assert signal_share(model)[0].tolist() == [pytest.approx(3 / 34), 0, 0, 0, 0, 0, 0]
    q[0, 0] = 2.0
    assert signal_share(model)[0, 0] == 0
    q[0, 0] = -4.0
    assert signal_share(model)[0, 0] == pytest.approx(4 / 35)


def test_lamp_scores_by_hand():
    scores = lamp_scores(torch.tensor([[3.0, -1.0], [0.0, 2.0]]))
    assert scores.tolist() == pytest.approx([0, 1 / 14, 4 / 13, 1])
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [0, 0, 0, 0]


def lamp_by_brute_force(model, keep):
    """Definition, weight by weight."""
    layers = []
    for block in weights_of(model):
        scores = []
        for weight in block:
            squares = weight.double().flatten().numpy() ** 2
            scores += [s / squares[squares >= s].sum() if s else 0.0 for s in squares]
        layers.append(np.array(scores))
    every = np.sort(np.concatenate(layers))[::-1]
    threshold = every[max(1, round(keep * len(every))) - 1]
    return [float((s >= threshold * (1 - 1e-12)).mean()) for s in layers]


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.5, 0.97, 1.0])
def test_lamp_keeps_what_the_definition_keeps(keep):
    model = plain(hidden_size=8, intermediate_size=10, num_attention_heads=2, num_hidden_layers=3)
    for layer, block in enumerate(weights_of(model)):
        for weight in block:
            weight.mul_(torch.rand(weight.shape) ** (2 * layer))  # skewed layer by layer
    found = lamp_kept(model, keep)
    assert found == pytest.approx(lamp_by_brute_force(model, keep), abs=1e-12)


def test_equal_scores_at_the_threshold_are_all_kept():
    model = plain(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2)
    blocks = weights_of(model)
    for weight in blocks[0] + blocks[1]:
        weight.zero_()
        weight[0, 0] = 1.0  # score 1, all others 0
    sizes = [sum(w.numel() for w in block) for block in blocks]
    share = [len(block) / size for block, size in zip(blocks, sizes, strict=True)]
    assert lamp_kept(model, 0.001) == pytest.approx(share)
    assert lamp_kept(model, 0.5).tolist() == [1, 1]


def test_half_precision_is_measured_in_float32():
    model = plain(dtype=torch.bfloat16)
    before = snapshot(model)
    seen = []
    share = signal_share(model, lambda *step: seen.append(step))
    assert seen == [(1, 3, "spectrum"), (2, 3, "spectrum"), (3, 3, "spectrum")]
    wide = plain(dtype=torch.bfloat16).double()
    np.testing.assert_allclose(share, signal_share(wide), atol=1e-5)
    assert lamp_kept(model) == pytest.approx(lamp_kept(wide))
    assert_untouched(model, before)


def test_what_is_refused():
    model = plain()
    for keep in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            lamp_kept(model, keep)
    assert projections(plain("phi3")) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert signal_share(plain("phi3")).shape == (3, 4)
    linear = linear_at(model, find_blocks(model)[1].down_proj)
    linear.weight.data[3, 4] = float("nan")
    for measure in (signal_share, lamp_kept):
        with pytest.raises(ValueError, match=r"weights of model.layers.1.mlp.down_proj must be f"):
            measure(model)
    linear.weight = torch.nn.Parameter(torch.ones(32, 40, dtype=torch.int8), requires_grad=False)
    for measure in (signal_share, lamp_kept):
        with pytest.raises(ValueError, match="got quantised ones"):
            measure(model)
