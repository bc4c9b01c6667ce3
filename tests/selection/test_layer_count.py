import numpy as np
import pytest

from floe.selection.ranking import choose_count, layer_memory, saved_bytes_per_token


def test_memory_of_a_layer():
    # 100 parameters with weight, gradient and two moments in float32; 7 tokens that keep 30 bytes.
    assert layer_memory([100, 50], 30, 7) == [1810, 1010]
    assert layer_memory([100, 50], [30, 0], 7) == [1810, 800]
    with pytest.raises(ValueError, match="saved_bytes must have 2 layers, got 1"):
        layer_memory([1, 2], [3], 4)
    with pytest.raises(ValueError, match="tokens must be in"):
        layer_memory([1], 1, -1)
    with pytest.raises(TypeError, match="parameters must be an integer, got float"):
        layer_memory([1.5], 1, 1)


def test_saved_bytes_of_a_token():
    # LLaMA2-7B: gate and up share x [4096], down has its own [11008]; r = 8, M = 4 in bfloat16.
    each = 8 * 4 * 2 + (8 + 4) * 4
    assert saved_bytes_per_token([4096, 4096, 11008], 8, 4) == (4096 + 11008) * 2 + 3 * each
    assert saved_bytes_per_token([5], 1, 1, element_bytes=4) == 20 + 4 + 8


def test_saved_bytes_are_what_the_op_keeps():
    torch = pytest.importorskip("torch")
    import floe

    kept = []
    tokens, rank, experts, features = 6, 3, 2, 5
    x = torch.randn(tokens, features)
    adapters = [torch.randn(rank + experts, features), torch.randn(4, experts, rank)]
    weight = torch.randn(4, features)
    leaves = [a.requires_grad_() for a in adapters]

    def pack(tensor):
        if all(tensor.data_ptr() != own.data_ptr() for own in (*leaves, weight)):
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        floe.moe_lora(x, weight, None, *leaves, scaling=2.0)
    each = saved_bytes_per_token([features], rank, experts, element_bytes=4)
    assert sum(kept) == tokens * each


def sweep(seed=0, rows=200):
    """Losses with a common part for each row, as validation rows have."""
    rng = np.random.default_rng(seed)
    common = rng.lognormal(0, 1, rows)
    means = {2: 0.5, 4: 0.2, 8: 0.012, 12: 0.001, 16: 0.0, 30: 0.002}
    return {k: common + mean + 0.05 * rng.normal(size=rows) for k, mean in means.items()}


def test_the_smallest_count_close_to_the_best():
    losses = sweep()
    found = choose_count(losses)
    best = min(losses, key=lambda k: losses[k].mean())
    assert found.best == best
    close = []
    for k, loss in losses.items():
        difference = loss - losses[best]
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        place = found.counts.index(k)
        assert found.above_best[place] == pytest.approx(difference.mean())
        assert found.above_best_error[place] == pytest.approx(error)
        if difference.mean() <= error:
            close.append(k)
    assert found.count == min(close) in (12, 16, 30)
    assert found.means[found.counts.index(4)] == pytest.approx(losses[4].mean())


def test_pairing_decides():
    """Rows differ far more than arms: unpaired errors would call every arm close."""
    losses = sweep()
    assert np.std(losses[4]) / np.sqrt(200) > 0.07
    assert choose_count(losses).count >= 8


def test_where_the_cliff_begins():
    losses = sweep()
    found = choose_count(losses)
    assert found.full == 30
    difference = losses[8] - losses[30]
    steep = difference.mean() > 2 * difference.std(ddof=1) / np.sqrt(200)
    assert found.worse == ((2, 4, 8) if steep else (2, 4))
    assert found.cliff == max(found.worse)
    flat = choose_count({8: [1.0, 2, 3], 4: [1.0, 2, 3]})
    assert (flat.count, flat.best, flat.full, flat.worse, flat.cliff) == (4, 4, 8, (), None)


def test_order_of_counts_does_not_matter():
    losses = sweep()
    shuffled = dict(reversed(losses.items()))
    assert choose_count(shuffled).counts == choose_count(losses).counts == (2, 4, 8, 12, 16, 30)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "numbers of layers >= 1 as keys"),
        ({0: [1, 2]}, "numbers of layers >= 1 as keys"),
        ({2: [1.0, 2], 4: [1.0]}, "same two or more rows"),
        ({2: [1.0]}, "same two or more rows"),
        ({2: [1.0, np.nan]}, r"losses\[2\] must be finite, got nan"),
    ],
)
def test_bad_losses(losses, message):
    with pytest.raises(ValueError, match=message):
        choose_count(losses)
