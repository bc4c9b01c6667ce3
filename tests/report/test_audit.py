"""The report's audit: real audits of synthetic scores, read strictly, drawn from artifacts."""

import csv
import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.report_fixture import LAYERS, TOP, write_json, write_run
from markupsafe import escape

from floe.artifacts.results import Router
from floe.errors import FileError
from floe.importance.scores import Scores
from floe.report import build_report
from floe.report.audit import pictures, shown_policy
from floe.report.page import sections
from floe.report.run import read_run
from floe.report.theme import DARK, LIGHT, render_svg
from floe.selection.audit import audit

AUDIT = "audit/audit.json"
HASH = "0" * 64
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def audits():
    """With per-sample arrays of the adapters, and without any."""
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(24, LAYERS)) * np.linspace(1, 3, LAYERS)
    heads = rng.random((LAYERS, 4)), rng.random((LAYERS, 4))
    neurons = rng.random((LAYERS, 16)), rng.random((LAYERS, 16))
    scores = Scores(heads[0], neurons[0], heads[1], neurons[1], samples.sum(axis=0))
    router = Router(0, "up_proj", (0.95, 0.05), 0.3, 0.2, 0.1)
    options = {"layers": TOP, "bootstrap": 40}
    full = replace(scores, adapter_samples=samples)
    return (
        replace(audit(full, router=[router], **options), selection=HASH),
        replace(audit(scores, **options), selection=HASH),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("built") / "demo")
    done = json.loads((folder / "select/DONE.json").read_text()) | {"inputs_hash": HASH}
    write_json(folder / "select/DONE.json", done)
    for name in ("search", "train", "profile", "eval"):  # their pictures take time
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture(scope="module")
def built(base, audits):
    """A folder of its own with the report of an audit that holds a hostile sentence."""
    folder = base.parent / "built"
    shutil.copytree(base, folder)
    put(folder, audits[0], lambda document: document["verdicts"]["note"].append(EVIL))
    build_report(folder)
    return folder


def put(folder, found, change=lambda document: None):
    """Write an audit, changed, into the run."""
    document = found.document()
    change(document)
    write_json(folder / AUDIT, document)
    return read_run(folder)


def section(run):
    (part,) = [part for part in sections(run) if part.key == "audit"]
    return part


def test_the_page_shows_verdicts_pictures_and_tables(built, audits):
    page = (built / "report.html").read_text(encoding="utf-8")
    for key in ("audit_agreement", "audit_bootstrap", "audit_stability"):
        assert f'id="figure-{key}"' in page
        assert (built / "report" / f"{key}.png").is_file()
    for kind, sentences in audits[0].verdicts.items():
        for sentence in sentences:
            shown = str(escape(sentence))
            assert f'<tr><th scope="row">{kind}</th><td>{shown}</td></tr>' in page
    assert "audit with --statistics shapley" in page
    assert EVIL not in page
    assert str(escape(EVIL)) in page


def test_tables_hold_the_audit_s_numbers(built, audits):
    found = audits[0]

    def rows(name):
        with (built / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[1:]

    names = found.agreement.names
    pairs = rows("audit_agreement")
    assert len(pairs) == len(names) * (len(names) - 1) // 2
    for one, other, rho, shared in pairs:
        a, b = names.index(one), names.index(other)
        want = found.agreement.spearman[a][b]
        assert rho == ("" if want is None else repr(want))
        assert int(shared) == found.agreement.overlap[a][b]
    drawn = rows("audit_bootstrap")
    own = next(one for one in found.bootstrap if one.name == "adapter_fisher")
    mine = [row for row in drawn if row[0] == "adapter_fisher"]
    assert [float(row[4]) for row in mine] == list(own.probability)
    assert [int(row[2]) for row in mine] == list(own.rank_low)
    assert len(rows("audit_rows")) == 4 * len(found.subsets)
    assert len(rows("audit_halves")) == len(found.subsets)
    assert len(rows("audit_budgets")) == 7 * len(found.budgets)


def test_without_rows_there_is_agreement_and_budgets(base, audits):
    run = put(base, audits[1])
    part = section(run)
    assert [picture.key for picture in part.pictures] == ["audit_agreement", "audit_stability"]
    assert {table.name for table in part.pictures[1].tables} == {"audit_budgets"}
    assert ("masks/global", audits[1].not_resampled["masks/global"]) in part.lacking
    for theme in (LIGHT, DARK):
        for picture in part.pictures:
            ElementTree.fromstring(render_svg(picture.draw, theme).encode("utf-8"))


def test_an_audit_from_before_policies_were_deleted_is_shown(base, audits):
    """It names a policy and a preset, and holds a comparison, that floe has no longer."""

    def old(document):
        document["gates"] = {"overlap": 1, "coupled": [0], "diagonal": [0], "optimal": True}
        document["masks"] = {"jaccard": 0.5, "masked": [1, 2], "block_loss": None}
        document["lacking"]["masks/block"] = "scores.head_gradient"
        document["lacking"]["gate_fisher"] = "scores.gate_gradient"

    part = section(put(base, audits[0], old))
    assert len(part.pictures) == 3
    assert ("gate_fisher", "scores.gate_gradient") in part.lacking


def test_no_audit_or_an_old_one_is_said(base, audits):
    (base / AUDIT).unlink(missing_ok=True)
    assert "was not audited: floe audit CONFIG" in section(read_run(base)).missing
    run = put(base, audits[0], lambda document: document.update(selection="1" * 64))
    part = section(run)
    assert "earlier selection" in part.missing
    assert not part.pictures
    assert not part.verdicts


def test_the_run_s_policy_is_shown_where_it_was_resampled(base, audits):
    run = put(base, audits[0])
    assert shown_policy(run.audit).name == "adapter_fisher"
    other = replace(run.audit, policy="even")
    assert shown_policy(other).name == run.audit.bootstrap[0].name
    assert len(pictures(other)) == 3


def test_constant_scores_leave_blanks(base, audits):
    def blank(document):
        matrix = document["agreement"]["spearman"]
        for row in matrix:
            row[3] = None
        matrix[3] = [None] * len(matrix)

    run = put(base, audits[0], blank)
    picture = section(run).pictures[0]
    name = audits[0].agreement.names[3]
    assert all(row[2] is None for row in picture.tables[0].rows if name in row[:2])
    ElementTree.fromstring(render_svg(picture.draw, LIGHT).encode("utf-8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format must be 1; audit again, got 2"),
        (lambda d: d.pop("format"), "format is missing"),
        (lambda d: d.update(layers=29), "layers must be 30 as in the scores"),
        (lambda d: d.update(policy="best"), "policy must be one of the policies"),
        (lambda d: d.pop("selection"), "selection is missing"),
        (lambda d: d["agreement"]["names"].append("even"), "agreement.names must be distinct"),
        (lambda d: d["agreement"]["names"].pop(), "agreement.spearman must be a"),
        (lambda d: d["policies"].pop(), "policy must be one of the policies that agreement names"),
        (lambda d: d["agreement"]["spearman"].pop(), "agreement.spearman must be a"),
        (lambda d: d["agreement"]["overlap"][0].pop(), "agreement.overlap must be a"),
        (lambda d: d["agreement"]["spearman"][0].__setitem__(0, "x"), "agreement.spearman must"),
        (lambda d: d["bootstrap"][0]["probability"].pop(), r"bootstrap\[0\].probability must be"),
        (lambda d: d["subsets"][0]["against_all"].pop(), r"subsets\[0\].against_all must be"),
        (lambda d: d["subsets"][0]["halves"]["overlap"].pop("low"), "halves.overlap.low is miss"),
        (lambda d: d["budgets"][0]["overlap"].pop(), r"budgets\[0\].overlap must be"),
        (lambda d: d["verdicts"].pop("solid"), "verdicts.solid is missing"),
        (lambda d: d["verdicts"]["open"].append(1), "verdicts.open must be a list of strings"),
        (lambda d: d.pop("lacking"), "lacking is missing"),
        (lambda d: d["policies"][0].update(name=3), "name must be a string"),
    ],
)
def test_a_damaged_audit_is_named(base, audits, change, message):
    with pytest.raises(FileError, match=message) as caught:
        put(base, audits[0], change)
    assert "audit.json" in str(caught.value)


def test_a_file_that_is_no_json_is_named(base):
    (base / AUDIT).write_text("{", encoding="utf-8")
    with pytest.raises(FileError, match="cannot be read as JSON"):
        read_run(base)
