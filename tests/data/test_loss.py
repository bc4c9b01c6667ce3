import pytest
import torch

from floe.data import loss as losses
from floe.data.loss import row_losses


def reference(logits, labels):
    """Token by token in float64."""
    logp = torch.log_softmax(logits.double(), -1)
    nll, tokens = [], []
    for row, wanted in zip(logp, labels.tolist(), strict=True):
        values = [-row[i - 1, w] for i, w in enumerate(wanted) if i > 0 and w != -100]
        nll.append(float(sum(values)))
        tokens.append(len(values))
    return torch.tensor(nll, dtype=torch.float64), torch.tensor(tokens)


def example(rows=4, length=9, vocabulary=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocabulary, generator=generator) * 3
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.5] = -100
    return logits, labels


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(seed):
    logits, labels = example(seed=seed)
    nll, tokens = row_losses(logits, labels)
    expected, count = reference(logits, labels)
    assert nll.dtype == torch.float32
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, count)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = example(length=200)
    half = logits.bfloat16()
    nll, _ = row_losses(half, labels)
    expected, _ = reference(half, labels)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-4)


def test_float64_stays_float64_and_gradcheck():
    logits, labels = example(rows=2, length=4, vocabulary=5)
    logits = logits.double().requires_grad_()
    assert row_losses(logits, labels)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: row_losses(x, labels)[0], (logits,))


def test_first_label_and_ignored_labels_never_count():
    logits, labels = example()
    labels[:, 0] = 3
    nll, tokens = row_losses(logits, labels)
    labels[:, 0] = -100
    again, same = row_losses(logits, labels)
    assert torch.equal(nll, again)
    assert torch.equal(tokens, same)
    labels[1] = -100
    nll, tokens = row_losses(logits, labels)
    assert nll[1] == 0
    assert tokens[1] == 0


def test_a_row_does_not_depend_on_its_neighbours():
    logits, labels = example(rows=5)
    nll, _ = row_losses(logits, labels)
    for s in range(5):
        alone, _ = row_losses(logits[s : s + 1], labels[s : s + 1])
        assert torch.equal(alone[0], nll[s])


def test_nan_outside_the_targets_stays_out():
    logits, labels = example(rows=2)
    labels[1] = -100
    logits[1] = float("nan")
    logits.requires_grad_()
    nll, _ = row_losses(logits, labels)
    nll.sum().backward()
    assert torch.isfinite(nll).all()
    assert torch.isfinite(logits.grad).all()


def test_chunks_change_nothing(monkeypatch):
    logits, labels = example()
    whole, _ = row_losses(logits, labels)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 50)
    assert torch.equal(row_losses(logits, labels)[0], whole)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (2, 0)])
def test_nothing_to_predict(shape):
    nll, tokens = row_losses(torch.zeros(*shape, 7), torch.zeros(shape, dtype=torch.int64))
    assert nll.tolist() == [0.0] * shape[0]
    assert tokens.tolist() == [0] * shape[0]


def test_refusals():
    logits, labels = example()
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        row_losses(labels, labels)
    with pytest.raises(TypeError, match=r"labels must be int64, got torch\.int32"):
        row_losses(logits, labels.int())
    with pytest.raises(ValueError, match=r"got \(4, 9, 23\) and \(4, 8\)"):
        row_losses(logits, labels[:, 1:])
    with pytest.raises(ValueError, match=r"labels must be -100 or >= 0, got -1"):
        row_losses(logits, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match=r"below the vocabulary size 23, got 23"):
        row_losses(logits, torch.full_like(labels, 23))
