import random

import pytest
import torch
from helpers.tiny import tiny_model, tiny_rows, tiny_tokenizer
from torch import nn

from floe.data import rows as data
from floe.data.batches import Collator, TokenRow, fingerprint, make_batches, row_order
from floe.data.loss import row_losses
from floe.data.rows import Encoded, encode, rows_of_both
from floe.errors import DataError

ROW = {"prompt": "ask: ", "completion": "yes"}


def test_labels_come_from_structure_though_pad_is_eos():
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    rows = encode([ROW, {"prompt": "a longer question: ", "completion": "no"}], tokenizer).rows
    assert rows[0].response == (*tokenizer("yes")["input_ids"], 0)
    batch = Collator(tokenizer.pad_token_id)(rows)
    assert batch["logits_to_keep"].tolist() == list(
        range(batch["input_ids"].shape[1] - 5, batch["input_ids"].shape[1])
    )
    assert batch["labels"][0].tolist() == [-100, *rows[0].response]
    assert batch["labels"][1].tolist() == [-100, -100, *rows[1].response]
    assert (batch["labels"][:, -1] == 0).all()  # the stop token is learnt


def test_left_padding_and_positions():
    batch = Collator(9, keep_logits=False)([TokenRow((1, 2), (3,)), TokenRow((1, 2, 3, 4), (5, 0))])
    assert batch["input_ids"].tolist() == [[9, 9, 9, 1, 2, 3], [1, 2, 3, 4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert batch["position_ids"][0, 3:].tolist() == [0, 1, 2]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch["labels"].tolist() == [[-100] * 5 + [3], [-100] * 4 + [5, 0]]
    assert "logits_to_keep" not in batch


def test_row_without_prompt_does_not_count_its_first_token():
    row = TokenRow((), (4, 5, 0))
    assert row.labels == (-100, 5, 0)
    assert row.targets == 2
    batch = Collator()([row])
    assert batch["logits_to_keep"].tolist() == [0, 1, 2]
    assert batch["labels"].tolist() == [[-100, 5, 0]]


def test_kept_logits_give_the_loss_of_all_logits():
    model, rows = tiny_model(), tiny_rows(7)
    short, full = Collator(keep_logits=True)(rows), Collator(keep_logits=False)(rows)
    with torch.no_grad():
        a = row_losses(model(**short).logits, short["labels"])
        b = row_losses(model(**full).logits, full["labels"])
    assert torch.equal(a[1], b[1])
    assert a[1].tolist() == [row.targets for row in rows]
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)


def test_truncation_takes_the_left_of_the_prompt_never_the_response():
    tokenizer = tiny_tokenizer(bos=True)
    row = {"prompt": "0123456789", "completion": "abc"}
    whole = encode([row], tokenizer).rows[0]
    assert whole.prompt[0] == 1
    cut = encode([row], tokenizer, max_length=8)
    assert cut.cut == [0]
    assert cut.rows[0].response == whole.response
    assert cut.rows[0].prompt == (1, *whole.prompt[-3:])  # bos stays
    assert len(cut.rows[0]) == 8
    assert encode([row], tokenizer, max_length=15).cut == []
    only_bos = encode([row], tokenizer, max_length=5).rows[0]
    assert only_bos.prompt == (1,)


def test_rows_without_a_target_are_dropped_and_counted():
    rows = [ROW, {"prompt": "p", "completion": "  "}, {"prompt": "p", "completion": "x" * 20}, ROW]
    encoded = encode(rows, tiny_tokenizer(), max_length=12)
    assert [row.index for row in encoded.rows] == [0, 3]
    assert encoded.dropped == {"without a completion": [1], "too long for max_length": [2]}
    assert (encoded.given, encoded.lost, encoded.cut) == (4, 2, [])
    some = encode({7: ROW, 9: rows[1]}, tiny_tokenizer())  # rows keep the numbers that they came by
    assert [row.index for row in some.rows] == [7]
    assert some.dropped == {"without a completion": [9]}
    with pytest.raises(
        DataError,
        match=r"train: no row with a target is left of 2: 1 .*, 1 too long.*max_length=12",
    ):
        encode(rows[1:3], tiny_tokenizer(), max_length=12, source="train")


def test_rows_of_both_are_those_that_neither_dropped():
    def encoded(numbers, dropped, cut):
        return Encoded([TokenRow((1,), (2,), i) for i in numbers], 9, dropped, cut)

    first = encoded([1, 2, 3, 4], {"a": [0, 5]}, [1, 2])
    both = rows_of_both(first, encoded([4, 2, 5], {"a": [3], "b": [0, 1]}, [4, 5]), 8, "test")
    assert [row.index for row in both.rows] == [2, 4]
    assert both.dropped == {"a": [0, 3, 5], "b": [1]}  # each row under one reason
    assert (both.cut, both.given, both.lost) == ([2, 4], 9, 4)
    assert first.dropped == {"a": [0, 5]}
    with pytest.raises(DataError, match="test: no row with a target is left of 9: 2 a, 4 c"):
        rows_of_both(first, encoded([], {"c": [1, 2, 3, 4]}, []), 8, "test")


def test_templates():
    tokenizer = tiny_tokenizer()
    text = encode([ROW], tokenizer, template="Q {prompt}A {x}").rows[0]
    assert tokenizer.decode(text.prompt) == "Q ask: A {x}"
    chat = encode([ROW], tokenizer, template="chat").rows[0]
    assert tokenizer.decode(chat.prompt) == "<u>ask: <e><a>"
    assert chat.prompt[0] == 2
    with pytest.raises(ValueError, match="template must be none, chat or hold"):
        encode([ROW], tokenizer, template="Q")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="without a chat template"):
        encode([ROW], tokenizer, template="chat")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an eos token"):
        encode([ROW], tokenizer)


def test_encode_refuses_bad_lengths():
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        encode([ROW], tiny_tokenizer(), max_length=1)
    with pytest.raises(TypeError, match="max_length must be an int, got float"):
        encode([ROW], tiny_tokenizer(), max_length=8.0)


def test_batches_cover_every_row_once_and_padding_is_small():
    rows = tiny_rows(23)
    order = row_order(rows)
    batches = make_batches(rows, 4)
    assert sorted(order) == list(range(23))
    assert [len(b["labels"]) for b in batches] == [4] * 5 + [3]
    lengths = torch.cat([b["attention_mask"].sum(1) for b in batches]).tolist()
    assert lengths == [len(rows[i]) for i in order]
    assert lengths == sorted(lengths, reverse=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_batches(rows, 0)
    with pytest.raises(ValueError, match="rows must not be empty"):
        make_batches([], 2)
    with pytest.raises(ValueError, match="at least one row"):
        Collator()([])


def test_split_and_sample_are_seeded_and_keep_order():
    rows = list(range(100))
    kept, held = data.split(rows, 0.05, seed=3)
    assert len(held) == 5
    assert sorted(kept + held) == rows
    assert kept == sorted(kept)
    assert data.split(rows, 0.05, seed=3) == (kept, held)
    assert data.split(rows, 0.05, seed=4)[1] != held
    small, large = data.sample(rows, 10), data.sample(rows, 20)
    assert set(small) < set(large)
    assert large == sorted(large)
    assert data.sample(rows, 1000) == rows
    random.seed(0)
    before = random.getstate(), torch.get_rng_state()
    data.sample(rows, 5)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_split_refuses(fraction):
    with pytest.raises(ValueError, match=r"fraction must be inside \(0, 1\)"):
        data.split([1, 2, 3], fraction)


def test_split_needs_two_rows():
    with pytest.raises(ValueError, match="rows must be at least 2"):
        data.split([1], 0.5)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        data.sample([1], 0)


def test_fingerprint_sees_tokens_order_and_split():
    a, b = TokenRow((1, 2), (3,)), TokenRow((1,), (2, 3))
    prints = {fingerprint(r) for r in ([a], [b], [a, b], [b, a])}
    assert len(prints) == 4
    assert fingerprint([a]) == fingerprint([TokenRow((1, 2), (3,), 7, "t")])


def test_models_without_kept_logits_get_full_labels():
    class Old(nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert not Collator.for_model(Old()).keep_logits
    assert Collator.for_model(tiny_model(), 5) == Collator(5, True)
