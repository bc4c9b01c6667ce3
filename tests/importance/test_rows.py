import pytest
import torch
from helpers.importance_models import batches

from floe.data.batches import Collator, TokenRow, fingerprint, in_batches, make_batches, rows_of
from floe.importance.chunk_store import chunks, passes

LENGTHS = ((9, 4), (5, 2), (7, 3), (3, 1), (8, 5))


collate = Collator()


def same(one, other):
    return (
        one.prompt + one.response == other.prompt + other.response
        and one.inputs.keys() == other.inputs.keys()
        and all(torch.equal(one.inputs[k], other.inputs[k]) for k in one.inputs)
        and one.labels == other.labels
    )


@pytest.mark.parametrize("given", [{"size": 1}, {"size": 2}, {"side": "right"}, {"keep": True}])
def test_rows_are_the_same_however_they_came(given):
    expected = rows_of(batches(LENGTHS))
    assert [len(row) for row in expected] == [9, 5, 7, 3, 8]
    assert [row.targets for row in expected] == [4, 2, 3, 1, 5]
    found = rows_of(batches(LENGTHS, **given))
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_a_batch_of_rows_is_what_it_was():
    (batch,) = batches(LENGTHS, keep=True)
    rebuilt = collate(rows_of([batch]))
    assert rebuilt.keys() == batch.keys()
    for name, value in batch.items():
        assert torch.equal(rebuilt[name], value), name


def test_without_padding_positions_and_labels():
    ids = torch.tensor([[3, 4, 5]])
    (row,) = rows_of([{"input_ids": ids}])
    assert row.targets == 0
    batch = collate([row])
    assert batch["position_ids"].tolist() == [[0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch["labels"].unique().tolist() == [-100]


def test_nothing_predicts_a_first_token():
    ids = torch.tensor([[0, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]]), "labels": ids.clone()}
    assert rows_of([batch])[0].labels == (-100, 8)


def test_other_inputs_of_one_value_a_token_are_kept():
    (batch,) = batches(LENGTHS)
    kinds = batch["attention_mask"] * torch.arange(9)
    rebuilt = collate(rows_of([batch | {"token_type_ids": kinds}]))
    assert torch.equal(rebuilt["token_type_ids"], kinds)


def test_labels_that_are_not_the_response_are_kept():
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    labels = torch.tensor([[-100, -100, 5, -100, 9]])
    (row,) = rows_of([{"input_ids": ids, "labels": labels}])
    assert (row.prompt, row.response, row.targets) == ((3, 4), (5, 6, 7), 2)
    assert collate([row])["labels"].tolist() == [[-100, 5, -100, 9]]
    assert fingerprint([row]) != fingerprint([TokenRow(row.prompt, row.response)])


def test_rows_are_those_of_the_batches_that_would_be_made_of_them():
    rows = [TokenRow((5,) * n, (6,) * (n % 3 + 1), n) for n in (4, 9, 2, 7, 7)]
    given, unpadded = in_batches(rows, 2), rows_of(make_batches(rows, 2))
    assert [row.index for row in given] == [9, 7, 7, 4, 2]
    assert [row.batch for row in given] == [row.batch for row in unpadded] == [0, 0, 1, 1, 2]
    assert fingerprint(given) == fingerprint(unpadded)
    assert rows_of(given) == given


def plain_rows(lengths, sizes=None):
    numbers = [n for n, size in enumerate(sizes or [1] * len(lengths)) for _ in range(size)]
    return [
        TokenRow((0,) * length, (), batch=number)
        for length, number in zip(lengths, numbers, strict=True)
    ]


def test_chunks_have_32_rows_or_end_with_a_batch():
    assert chunks(plain_rows([3] * 70)) == [range(32), range(32, 64), range(64, 70)]
    rows = plain_rows([3] * 70, [20, 20, 20, 10])
    assert chunks(rows, whole_batches=True) == [range(40), range(40, 70)]


def test_passes_hold_rows_of_like_length_within_their_room():
    rows = plain_rows([5, 9, 2, 9, 4])
    assert passes(rows, range(5), tokens=18) == [[1, 3], [0, 4, 2]]
    assert passes(rows, range(5), tokens=1) == [[1], [3], [0], [4], [2]]
    assert passes(rows, [4, 2], tokens=100) == [[4, 2]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "at least one row, got none"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "pixels": torch.ones(2, 3, 4)},
            r"pixels of a calibration batch must be one value a token, .* got \(2, 3, 4\)",
        ),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.int64),
                "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]),
            },
            "row 1 must have at least one token, got none",
        ),
    ],
)
def test_refusals(batch, message):
    with pytest.raises(ValueError, match=message):
        rows_of([batch])
