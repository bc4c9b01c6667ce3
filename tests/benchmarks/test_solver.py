"""The solvers' benchmark: it times only what is right, and reads growth off a line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: an installed floe stays first

from benchmarks import harness, solver
from benchmarks.harness import WrongResult
from benchmarks.solver import Units


@pytest.mark.parametrize("kind", ["fisher", "taylor", "uniform"])
@pytest.mark.parametrize("problem", [solver.two_class, solver.knapsack])
def test_every_program_is_right(problem, kind):
    found = problem(Units.draw(3000, kind))
    assert [c.name for c in found][:2] == ["numpy", "floe"]
    assert len(found) == 3
    for candidate in found:
        assert harness.gate(candidate) < 1e-3


def test_the_largest_sizes_are_not_summed_anew(monkeypatch):
    monkeypatch.setattr(solver, "_RESUMMED", 2999)
    assert [c.name for c in solver.two_class(Units.draw(3000, "fisher"))] == ["numpy", "floe"]


@pytest.mark.parametrize(
    ("problem", "program"),
    [(solver.two_class, "two_class_by_numpy"), (solver.knapsack, "knapsack_by_numpy")],
)
def test_a_program_that_retains_too_little_or_too_much_is_not_timed(problem, program, monkeypatch):
    units, right = Units.draw(3000, "fisher"), getattr(solver, program)

    def flipped(units, position):
        mask = right(units)
        mask[np.flatnonzero(mask == (position < 0))[0]] ^= True
        return mask

    for position in (-1, 1):
        monkeypatch.setattr(solver, program, lambda units, p=position: flipped(units, p))
        candidate = problem(replace(units))[0]
        with pytest.raises(WrongResult, match=r"numpy: .* not timed"):
            harness.gate(candidate)


def test_growth_is_the_slope_of_the_logarithms():
    assert solver.exponent([10, 100, 1000], [3, 30, 300]) == pytest.approx(1.0)
    assert solver.exponent([10, 100, 1000], [1, 100, 10_000]) == pytest.approx(2.0)


def test_the_command_writes_records_and_a_picture(tmp_path, capsys):
    records, picture = tmp_path / "solver.json", tmp_path / "solver.png"
    arguments = ["--sizes", "300,900", "--rounds", "2", "--threads", "1", "--clock", "processor"]
    solver.main([*arguments, "--json", str(records), "--plot", str(picture)])
    rows = json.loads(records.read_text())["rows"]
    assert len(rows) == 2 * 2 * 3
    assert {row["case"]["units"] for row in rows} == {300, 900}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert printed.count("time grows as n^") == 6
    assert "summed anew" in printed
