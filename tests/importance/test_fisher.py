import numpy as np
import pytest
from helpers.importance_models import (
    adapted,
    assert_untouched,
    batches,
    measure_fisher,
    plain,
    snapshot,
)

from floe.importance.fisher import added, terms
from floe.importance.gradients import Capture


def fisher_of(gradients, reduction, size):
    batches = [row // size for row in range(len(gradients))]
    return added(terms(gradients, reduction, batches)).tolist()


def test_worked_examples():
    rows = np.array([[1.5, 2.0], [1.0, 0.0]])
    assert fisher_of(rows, "sample", 2) == [3.25, 4.0]
    assert fisher_of(rows, "batch", 2) == [1.5625, 1.0]
    scalar = np.array([[3.0], [1.0], [-1.0], [1.0]])
    assert fisher_of(scalar, "sample", 4) == [12.0]
    assert fisher_of(scalar, "batch", 2) == [4.0]
    assert fisher_of(scalar, "batch", 4) == [1.0]


def relative(found, expected):
    return abs(found - expected).max() / abs(expected).max()


LENGTHS = ((9, 4), (5, 2), (7, 3), (3, 1), (8, 5), (6, 2), (4, 3), (9, 1))


def test_batch_size_changes_not_a_bit_but_a_batch_estimator_does():
    model = adapted()
    one = measure_fisher(model, batches(LENGTHS, size=1), adapters=True)
    eight = measure_fisher(model, batches(LENGTHS, size=8), adapters=True)
    for name in ("head", "neuron", "adapter"):
        assert np.array_equal(getattr(eight, name), getattr(one, name))
    wrong = measure_fisher(model, batches(LENGTHS, size=8), reduction="batch")
    assert relative(wrong.head * 8, one.head) > 0.1
    assert relative(wrong.neuron * 8, one.neuron) > 0.1
    assert (one.rows, one.tokens) == (8, 21)
    assert (eight.rows, eight.tokens) == (8, 21)


def test_batches_of_one_row_are_samples():
    model = adapted()
    sample = measure_fisher(model, batches(size=1))
    batch = measure_fisher(model, batches(size=1), reduction="batch")
    assert np.array_equal(sample.head, batch.head)


def test_is_the_sum_of_squared_row_gradients():
    model = adapted()
    with Capture(model) as capture:
        rows = [capture.step(b) for b in batches()]
    result = measure_fisher(model, batches(size=2), keep_samples=True, first_order=True)
    for name in ("head", "neuron"):
        gradients = np.concatenate([getattr(r, name) for r in rows])
        assert relative(getattr(result, name), np.square(gradients).sum(0)) < 1e-5
        assert relative(getattr(result, f"{name}_mean"), gradients.mean(0)) < 1e-5
        assert relative(getattr(result, f"{name}_gradient"), gradients) < 1e-5
    assert measure_fisher(model, batches()).head_gradient is None
    assert measure_fisher(model, batches()).head_mean is None


def test_many_chunks_add_up_and_keep_the_rows_in_order():
    model, given = adapted(), batches(LENGTHS * 9, size=5)
    result = measure_fisher(
        model, given, adapters=True, keep_samples=True, first_order=True, scope="full"
    )
    with Capture(model, adapters=True, scope="full") as capture:
        rows = [capture.step(batch) for batch in given]
    neuron, adapter, gate = (
        np.concatenate([getattr(r, name) for r in rows]) for name in ("neuron", "adapter", "gate")
    )
    assert (result.rows, result.tokens) == (72, 9 * 21)
    assert relative(result.neuron, np.square(neuron).sum(0)) < 1e-5
    assert relative(result.neuron_mean, neuron.mean(0)) < 1e-5
    assert relative(result.neuron_gradient, neuron) < 1e-5
    assert relative(result.module, adapter.sum(0)) < 1e-5
    assert relative(result.adapter_samples, adapter.sum(2)) < 1e-5
    assert relative(result.gate_gradient, gate) < 1e-5
    assert result.projections == ("gate_proj", "up_proj", "down_proj")


def test_adapter_alone_equals_adapter_beside_masks():
    model = adapted()
    before = snapshot(model)
    both = measure_fisher(model, batches(size=2), adapters=True)
    alone = measure_fisher(model, batches(size=2), masks=False, adapters=True)
    assert relative(alone.adapter, both.adapter) < 1e-6
    assert alone.head is None
    assert_untouched(model, before)


def test_repeats_bit_by_bit():
    model = adapted("qwen2")
    first, second = (measure_fisher(model, batches(size=2), adapters=True) for _ in range(2))
    assert np.array_equal(first.head, second.head)
    assert np.array_equal(first.neuron, second.neuron)
    assert np.array_equal(first.adapter, second.adapter)


def test_progress_and_plain_models():
    seen = []
    result = measure_fisher(plain(), batches(size=2), progress=lambda *a: seen.append(a))
    assert seen == [(5, 5, "fisher")]
    assert result.adapter is None


def test_refusals():
    with pytest.raises(ValueError, match="reduction must be one of"):
        measure_fisher(plain(), batches(), reduction="mean")
    with pytest.raises(ValueError, match="at least one row"):
        measure_fisher(plain(), [])
