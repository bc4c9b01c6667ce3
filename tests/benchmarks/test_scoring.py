import time

import pytest
import torch
from helpers.importance_models import adapted, batches

from benchmarks import harness, scoring
from benchmarks.harness import Bench, WrongResult
from benchmarks.scoring import ARMS, TAYLOR, Options, Subject, check, compare
from floe.data.batches import rows_of

LENGTHS = tuple((5 + n % 5, 1 + n % 3) for n in range(40))


@pytest.fixture
def subject():
    return Subject(adapted().eval(), rows_of(batches(LENGTHS)))


def test_every_arm_runs_over_the_same_passes(subject, capsys):
    options = Options(no_memory=True)
    bench = Bench(torch.device("cpu"), time.perf_counter, {"commit": None}, rounds=1)
    for arms, rows in ((ARMS, 40), (TAYLOR, 32)):
        made = compare(bench, subject, arms, rows, options)
        assert [row["case"]["implementation"] for row in made] == list(arms)
        assert f"{rows} rows" in capsys.readouterr().out
    assert sorted(n for _, group in subject.passes(subject.rows) for n in group) == list(range(40))


def test_a_wrong_mask_gradient_is_not_timed(subject, monkeypatch):
    (found,) = check(subject)
    assert found.actual.shape == found.exact.shape == (40,)
    step = scoring.Capture.step

    def flipped(self, *arguments):
        rows = step(self, *arguments)
        rows.neuron[:] *= -1
        return rows

    monkeypatch.setattr(scoring.Capture, "step", flipped)
    masks = harness.Candidate("masks", lambda: None, lambda: check(subject))
    with pytest.raises(WrongResult, match="mask gradients has relative error 2"):
        harness.gate(masks)
