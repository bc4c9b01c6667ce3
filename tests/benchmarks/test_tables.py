"""The tables of results are those of the rows that are kept beside the benchmarks."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: an installed floe stays first

from benchmarks import tables

FILES = sorted(tables.RESULTS.glob("*.json"))


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_hold_the_tables_of_the_rows(document):
    text = document.read_text(encoding="utf-8")
    assert tables.written(text) == text, "run `make tables`"


def test_every_file_of_rows_is_one_table_and_says_where_it_is_from():
    texts = "".join(path.read_text(encoding="utf-8") for path in tables.DOCUMENTS)
    assert sorted(re.findall(r"<!-- rows: (\w+) -->", texts)) == [file.stem for file in FILES]
    assert texts.count("<!-- end -->") == len(FILES) == len(tables.TABLES)
    for file in FILES:
        facts = json.loads(file.read_text(encoding="utf-8"))
        assert all(facts[key] for key in ("what", "command", "machine", "date", "versions"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_another_number_in_any_row_is_another_table(file, tmp_path, monkeypatch):
    shutil.copytree(tables.RESULTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    before, facts = tables.table(file.stem), json.loads(file.read_text(encoding="utf-8"))
    for number in range(len(facts["rows"])):
        changed = json.loads(file.read_text(encoding="utf-8"))
        row = changed["rows"][number]
        value = row.get("ratio") or row.get("loss") or row["default_minus_this_at_equal_seconds"]
        value["median" if "median" in value else "low"] += 0.01
        (tmp_path / file.name).write_text(json.dumps(changed), encoding="utf-8")
        assert tables.table(file.stem) != before


def test_tables_are_written_between_their_markers_alone(tmp_path, monkeypatch):
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- rows: demo -->\n| old |\n<!-- end -->\nb\n")
    monkeypatch.setattr(tables, "DOCUMENTS", (document,))
    tables.main()
    assert document.read_text() == (
        f"a\n<!-- rows: demo -->\n{tables.table('demo')}<!-- end -->\nb\n"
    )
