import math

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_rows, tiny_tokenizer
from transformers import GenerationConfig

from floe.adapters import FloeConfig, get_model, remove_adapters
from floe.data.batches import Collator, TokenRow, make_batches
from floe.data.rows import encode
from floe.errors import DataError
from floe.evaluation import (
    Answers,
    Losses,
    evaluate_choices,
    evaluate_generation,
    evaluate_loss,
    evaluate_rows,
    group_by_task,
    paired_difference,
    summarise_loss,
    validation_loss,
    wilson,
)


def by_hand(model, row):
    """Log-softmax of the row alone, without padding, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([row.prompt + row.response])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    places = range(max(1, len(row.prompt)), len(row))
    return -sum(float(logp[i - 1, (row.prompt + row.response)[i]]) for i in places)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_a_row_has_the_same_loss_in_every_batch(batch_size, keep):
    model, rows = tiny_model(), tiny_rows(16)
    batches = [Collator(0, keep)(rows[n : n + batch_size]) for n in range(0, len(rows), batch_size)]
    losses = evaluate_loss(model, batches)
    assert losses.tokens.tolist() == [row.targets for row in rows]
    np.testing.assert_allclose(losses.nll, [by_hand(model, row) for row in rows], atol=1e-5)


def test_the_pad_token_changes_nothing():
    model, rows = tiny_model(), tiny_rows(9)
    a, b = evaluate_rows(model, rows, 4, pad_id=0), evaluate_rows(model, rows, 4, pad_id=77)
    assert np.array_equal(a.nll, b.nll)


def test_rows_keep_their_order_and_summary_is_token_weighted():
    model, rows = tiny_model(), tiny_rows(11)
    losses = evaluate_rows(model, rows, 4)
    np.testing.assert_allclose(losses.nll, [by_hand(model, row) for row in rows], atol=1e-5)
    summary = summarise_loss(losses)
    assert summary.value == pytest.approx(losses.nll.sum() / losses.tokens.sum())
    assert summary.value == pytest.approx(validation_loss(model, make_batches(rows, 3)), abs=1e-6)
    assert (summary.rows, summary.tokens) == (11, sum(r.targets for r in rows))
    assert summary.low < summary.value < summary.high
    assert summarise_loss(losses) == summary
    assert summarise_loss(losses, seed=1).low != summary.low
    part = group_by_task(rows)["task1"]
    assert part == [1, 4, 7, 10]
    assert np.array_equal(losses.take(part).nll, losses.nll[part])


def test_losses_and_answers_speak_of_rows_by_number():
    """Rows left out of one are not taken for their neighbours in the other."""
    losses = Losses(np.array([1.0, 2.0, 3.0]), np.array([1, 1, 2]), np.array([4, 1, 7]))
    assert losses.take([7, 4]).nll.tolist() == [3.0, 1.0]
    assert losses.take([7, 4]).rows.tolist() == [7, 4]
    assert losses.take([7, 4]).take([4]).nll.tolist() == [1.0]
    with pytest.raises(ValueError, match="rows that were measured once, got no row 0"):
        losses.take([4, 0])
    answers = Answers(["a", "b", "c"], np.array([True, False, True]), np.array([4, 1, 7]))
    assert answers.accuracy([1, 7]) == wilson(1, 2)
    with pytest.raises(ValueError, match="got no row 2"):
        answers.accuracy([2])
    assert Answers(["a", "b"], np.array([True, False])).rows.tolist() == [0, 1]
    twice = Losses(np.ones(2), np.ones(2, dtype=np.int64), np.array([3, 3]))
    with pytest.raises(ValueError, match="numbers that occur twice"):
        twice.take([3])
    with pytest.raises(ValueError, match=r"all values must be of 2 rows, got \[2, 3\]"):
        Answers(["a", "b"], np.ones(3, dtype=bool))
    rows = [TokenRow((5,), (6,), 9, "t"), TokenRow((5,), (6, 7), 2, "u"), TokenRow((5,), (6,), 3)]
    assert group_by_task(rows) == {"t": [9], "u": [2]}
    assert evaluate_rows(tiny_model(), rows).rows.tolist() == [9, 2, 3]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(1, 9, 60)
        nll = tokens * rng.gamma(2.0, 1.0, 60)  # mean 2 nats a token
        summary = summarise_loss(Losses(nll, tokens), resamples=300)
        covered += summary.low <= 2.0 <= summary.high
    assert 175 <= covered <= 199


def test_paired_difference():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 200)
    base = tokens * rng.gamma(2.0, 1.0, 200)
    a, b = Losses(base + 0.05 * tokens, tokens), Losses(base, tokens)
    found = paired_difference(a, b)
    assert found.value == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05)  # the arms share every resample
    assert found.high == pytest.approx(0.05)
    noisy = Losses(base + rng.normal(0, 0.3, 200), tokens)
    found = paired_difference(noisy, b)
    assert found.low < found.value < found.high
    assert found.value == -paired_difference(b, noisy).value
    with pytest.raises(ValueError, match="losses of the same rows"):
        paired_difference(a, Losses(base, tokens + 1))
    with pytest.raises(ValueError, match="losses of the same rows"):
        paired_difference(a, Losses(base, tokens, np.arange(1, 201)))


def test_wilson():
    found = wilson(8, 10)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)
    assert wilson(0, 5).low == 0
    assert wilson(5, 5).high == 1
    assert wilson(5, 5).low > 0.5
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson(0, 0)


def test_modes_gradients_and_cache_are_restored():
    model = tiny_model().train()
    model.lm_head.eval()
    model.config.use_cache = True
    seen = []

    def fail(_module, _args, arguments):
        seen.append((any(m.training for m in model.modules()), torch.is_grad_enabled()))
        seen.append(arguments["use_cache"])
        raise KeyError

    handle = model.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(KeyError):
        evaluate_rows(model, tiny_rows(2))
    handle.remove()
    assert seen == [(False, False), False]
    assert model.training
    assert not model.lm_head.training
    assert torch.is_grad_enabled()
    assert model.config.use_cache is True


def test_refusals():
    model = tiny_model()
    with pytest.raises(ValueError, match="batches must not be empty"):
        evaluate_loss(model, [])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss of row 0 must be finite, got nan"):
        evaluate_rows(model, tiny_rows(2))
    with pytest.raises(ValueError, match="at least one target token, got none"):
        summarise_loss(Losses(np.zeros(2), np.zeros(2, dtype=np.int64)))
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        summarise_loss(Losses(np.ones(2), np.ones(2, dtype=np.int64)), resamples=0)


ROWS = [
    {
        "prompt": "colour? ",
        "completion": "red",
        "choices": ["red", "a long answer", "b"],
        "answer": 0,
    },
    {
        "prompt": "a much longer question? ",
        "completion": "no",
        "choices": ["yes", "no"],
        "answer": 1,
    },
    {"prompt": "q ", "completion": "zz", "choices": ["abc", "zz", "12345678", "x"], "answer": 1},
]


@pytest.mark.parametrize("score", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_choices_are_the_most_likely_ones(score, batch_size):
    model, tokenizer = tiny_model(seed=3), tiny_tokenizer()
    answers = evaluate_choices(model, tokenizer, ROWS, score=score, batch_size=batch_size)
    for row, given in zip(ROWS, answers.given, strict=True):
        values = []
        for text in row["choices"]:
            choice = TokenRow(
                tuple(tokenizer(row["prompt"])["input_ids"]), tuple(tokenizer(text)["input_ids"])
            )
            nll = by_hand(model, choice)
            values.append(-nll / (len(choice.response) if score == "mean" else 1))
        assert given == int(np.argmax(values))
    right = [row["answer"] == given for row, given in zip(ROWS, answers.given, strict=True)]
    assert answers.correct.tolist() == right
    assert answers.accuracy() == wilson(sum(right), 3)
    assert answers.accuracy([1]).rows == 1


def test_length_matters_for_the_sum_only():
    answers = evaluate_choices(tiny_model(), tiny_tokenizer(), ROWS, score="sum")
    assert answers.given[0] == 2  # an almost uniform model finds the shortest choice likeliest
    assert answers.given[2] == 3


def test_choices_refuse():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(DataError, match="test, row 0: must have choices and answer"):
        evaluate_choices(model, tokenizer, [{"prompt": "p", "completion": "c"}], source="test")
    with pytest.raises(DataError, match=r"row 2: .*fit in max_length=8"):
        evaluate_choices(model, tokenizer, ROWS[1:2] * 2 + ROWS[2:], max_length=8)
    with pytest.raises(ValueError, match="score must be 'mean' or 'sum', got 'max'"):
        evaluate_choices(model, tokenizer, ROWS, score="max")
    with pytest.raises(ValueError, match="rows must not be empty"):
        evaluate_choices(model, tokenizer, [])


@pytest.fixture(scope="module")
def taught():
    """A model that has learnt three answers by heart."""
    rows = [
        {"prompt": f"ask {w}: ", "completion": a}
        for w, a in (("one", "A b"), ("seven", "xyz"), ("two", "q"))
    ]
    tokenizer, model = tiny_tokenizer(), tiny_model()
    batch = Collator()(encode(rows, tokenizer).rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(160):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, rows


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_by_exact_match(taught, batch_size):
    model, tokenizer, rows = taught
    changed = [rows[0], {**rows[1], "completion": "XYZ"}, {**rows[2], "completion": " q \n"}]
    answers = evaluate_generation(
        model, tokenizer, changed, max_new_tokens=6, batch_size=batch_size
    )
    assert answers.given == ["A b", "xyz", "q"]  # stops at eos, whatever is beside it
    assert answers.correct.tolist() == [True, False, True]
    cut = evaluate_generation(model, tokenizer, rows, max_new_tokens=2)
    assert cut.given == ["A ", "xy", "q"]


def test_an_answer_ends_at_every_stop_token(taught):
    """What follows a stop is no answer; model, tokenizer and template name stops."""
    model, tokenizer, rows = taught
    (blank,), base_config = tokenizer(" ")["input_ids"], model.generation_config
    try:
        for stops in (blank, [blank], [0, blank]):
            model.generation_config = GenerationConfig(
                eos_token_id=stops, repetition_penalty=50.0, min_new_tokens=4, num_beams=3
            )
            own = model.generation_config
            answers = evaluate_generation(model, tokenizer, rows, max_new_tokens=6)
            assert answers.given == ["A", "xyz", "q"]  # greedy: no penalty, no least length
            assert model.generation_config is own
        adapted = get_model(model, FloeConfig(r=2, num_experts=2))  # it changes nothing yet
        answers = evaluate_generation(adapted, tokenizer, rows, max_new_tokens=6)
        assert answers.given == ["A", "xyz", "q"]
        remove_adapters(adapted)
        assert model.generation_config is own
    finally:
        model.generation_config = base_config
    ending = tiny_tokenizer()
    ending.chat_template = ending.chat_template.replace("<e>", "<u>")  # its own end of turn
    wanted = [{"prompt": "hi", "completion": "ok"}]
    learner, batch = tiny_model(), Collator()(encode(wanted, ending, template="chat").rows)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        learner(**batch).loss.backward()
        optimizer.step()
    ending.eos_token = None
    answers = evaluate_generation(learner.eval(), ending, wanted, template="chat", max_new_tokens=9)
    assert answers.given == ["ok"]


def test_generation_refuses(taught):
    model, tokenizer, rows = taught
    with pytest.raises(ValueError, match=r"max_new_tokens must be in \[1, 9\], got 10"):
        evaluate_generation(model, tokenizer, rows, max_length=10, max_new_tokens=10)
    with pytest.raises(ValueError, match="rows must not be empty"):
        evaluate_generation(model, tokenizer, [])
    with pytest.raises(DataError, match="row 0: prompt must hold at least one token"):
        evaluate_generation(model, tokenizer, [{"prompt": "", "completion": "c"}])


def test_uniform_model_has_the_loss_of_uniform_guessing():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert summarise_loss(evaluate_rows(model, tiny_rows(5))).value == pytest.approx(
        math.log(320), abs=1e-6
    )
