"""The test rows of a run: every figure is made of the same ones."""

import json

import pytest
from helpers.tiny_run import write_inputs

from floe.adapters import remove_adapters
from floe.adapters.files import save_adapter
from floe.config_file import parse_config
from floe.errors import DataError
from floe.pipeline import eval
from floe.pipeline.inputs import RunInputs

EASY = {"completion": "x", "choices": ["x", "y"], "answer": 0, "task": "easy"}
TEST = [
    {**EASY, "prompt": "a", "completion": " "},
    *({**EASY, "prompt": f"b{i}"} for i in range(3)),
    {**EASY, "prompt": "c", "choices": ["x", "y" * 80]},
    {**EASY, "prompt": "", "task": "hard"},
    *({**EASY, "prompt": f"d{i}", "task": "hard"} for i in range(4)),
    {**EASY, "prompt": "e" * 80, "task": "hard"},
]
USED = [1, 2, 3, 6, 7, 8, 9, 10]


def workspace(tmp_path, rows=TEST, held_out=None, **settings):
    config = write_inputs(tmp_path, layers=2)
    if held_out is not None:
        del config["data"]["test"], config["data"]["validation"]
        config["data"]["val_fraction"] = held_out
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["eval"] = settings
    return RunInputs(parse_config(config))


def evaluated(work, tmp_path):
    """The eval stage's folder, of one arm with fresh adapters."""
    model = work.fresh(2, 2)
    save_adapter(model, work.path / "train/main/adapter")
    remove_adapters(model)
    folder = tmp_path / "eval"
    folder.mkdir()
    eval.build(work, {"main": "d"}, folder)
    return folder


@pytest.mark.parametrize("accuracy", ["choices", "generation", "none"])
def test_progress_counts_the_rows_of_losses_and_answers_of_all_arms(tmp_path, accuracy):
    work = workspace(tmp_path, rows=TEST[1:4], accuracy=accuracy, batch_size=2)
    steps = []
    work.progress.step = lambda stage, done, total, note="": steps.append((done, total, note))
    evaluated(work, tmp_path)
    answers = {"choices": [2, 4, 6], "generation": [2, 3], "none": []}[accuracy]
    each = 3 + (answers[-1] if answers else 0)
    assert steps == [
        (before + done, 2 * each, f"{arm}: {what}")
        for before, arm in ((0, "base"), (each, "main"))
        for done, what in [*((n, "losses") for n in (2, 3)), *((3 + n, "answers") for n in answers)]
    ]


def test_loss_and_accuracy_are_of_the_same_rows(tmp_path, monkeypatch):
    work = workspace(tmp_path)
    encoded = work.encoded("test")
    assert encoded.dropped == {
        "without a completion": [0],
        "too long for max_length": [4],
        "without a prompt": [5],
    }
    assert (encoded.given, encoded.lost, encoded.cut) == (11, 3, [10])
    assert [row.index for row in work.test_rows] == USED
    assert work.test_examples == [TEST[i] for i in USED]

    def right_where_easy(model, tokenizer, rows, **settings):
        given = [0 if row["task"] == "easy" else 1 for row in rows]
        return eval.Answers(given, eval.np.array(given) == 0)

    monkeypatch.setattr(eval, "evaluate_choices", right_where_easy)
    folder = evaluated(work, tmp_path)
    results = json.loads((folder / "results.json").read_text())["arms"]["base"]
    found = {task: one["accuracy"]["value"] for task, one in results["by_task"].items()}
    assert found == {"easy": 1.0, "hard": 0.0}
    assert results["by_task"]["easy"]["loss"]["rows"] == 3
    assert results["accuracy"]["rows"] == results["loss"]["rows"] == len(USED)
    losses = json.loads((folder / "losses.json").read_text())
    assert losses["rows"] == USED
    assert len(losses["nll"]["base"]) == len(USED)


def test_rows_held_out_of_training_keep_their_numbers(tmp_path):
    work = workspace(tmp_path, held_out=0.25, accuracy="generation", limit=3)
    held = [row.index for row in work.validation_rows]
    assert len(held) == 12
    assert [row.index for row in work.test_rows] == held[:3]
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert work.test_examples == [json.loads(lines[i]) for i in held[:3]]
    assert work.accuracy == "generation"


def test_no_row_left_for_accuracy(tmp_path):
    with pytest.raises(DataError, match=r"data\.test: no row .* left of 1: 1 without a prompt"):
        _ = workspace(tmp_path, rows=TEST[5:6]).test_rows
