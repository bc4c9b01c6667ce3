"""Mutated configurations, overrides and artifacts: read as what they say, or refused in a line."""

import json
import random
import resource
import time
import traceback

import pytest
import yaml
from helpers.attack import trials
from helpers.report_fixture import write_run

from floe import FileError, RunConfig, load_config
from floe.config import storage_url
from floe.config_file import TEMPLATE, dump_config, parse_config
from floe.report.page import sections
from floe.report.run import read_run
from floe.report.summary import (
    arm_rows,
    arm_table,
    certificate_rows,
    environment_rows,
    facts,
    stage_table,
    verdicts,
)

SECRET = "S3CRET"
URL = f"postgresql://u:{SECRET}@h/db"
SECONDS, BYTES, CHARACTERS = 2.0, 500 << 20, 2000
VALUES = [
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 100_000,
    "1e-3",
    "010",
    "1:30",
    "a\0b",
    "\ud800",
    "../..",
    "<script>",
    URL,
    f"x {URL} y",
    "${FLOE_NOT_SET}",
    [],
    {},
    [[]],
    [None] * 1000,
    {"a": {"b": [1]}},
    {"params": 1},
    ["a"] * 3,
]
SNIPPETS = [
    "!!bool x",
    "!!int ''",
    "!!timestamp x",
    "!!python/object/apply:os.getcwd []",
    "!x",
    "!!set {}",
    "&a",
    "*a",
    "<<: *a",
    "<<: {r: 2}",
    "? [a]",
    "[" * 500,
    "- " * 500,
    "{" * 40,
    "\0",
    "\ufeff",
    "\t",
    "'",
    '"',
    '"\\ud800"',
    '"\\0"',
    "|\n",
    ">\n",
    "---\n",
    "...\n",
    "%YAML 1.9\n",
    "#",
    ": ",
    "1" * 400,
    "1:" * 5000,
    "2026-01-02",
    "010",
    "~",
    "=",
    "\xff",
    "\u2028",
    "train: {}\n",
    ", ",
    "[&b [x,x,x,x], &c [*b,*b,*b,*b], &d [*c,*c,*c,*c], [*d,*d,*d,*d]]",
    f"{{storage: '{URL}'}}",
]
BOMB = ["x"]
for _ in range(60):
    BOMB = [BOMB] * 9


def places(value, at=()):
    """The path of every value in a nest of dicts and lists; of a list its ends alone."""
    yield at
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = [(i, value[i]) for i in {0, len(value) - 1} if value]
    for key, part in items:
        yield from places(part, (*at, key))


def changed(value, at, new):
    """A copy with ``new`` at a place; an ellipsis deletes what is there."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def judged(read):
    """What ``read`` gave, or None where it refused; either in time, and without the secret."""
    began, said = time.perf_counter(), "read"
    try:
        found = read()
    except ValueError as error:
        found, said = None, str(error)
        text = "".join(traceback.format_exception(error))
        said += SECRET if SECRET in text else ""
    assert time.perf_counter() - began < SECONDS
    assert 0 < len(said) < CHARACTERS
    assert SECRET not in said
    return found


def check_config(config):
    """An accepted configuration is a whole one: written, it reads as the same but for secrets."""
    assert isinstance(config, RunConfig)
    text = dump_config(config)
    assert SECRET not in text
    again = parse_config(yaml.safe_load(text))
    if "***" not in text:
        assert again == config


def base(draw):
    """A full configuration with a password in it, sometimes the short one of ``floe init``."""
    data = yaml.safe_load(TEMPLATE.read_text())
    if draw.random() < 0.7:
        data = parse_config(data).model_dump(mode="json")
    data.setdefault("search", {})["storage"] = URL
    return data


def mutated_text(draw, text):
    """Up to three edits of a YAML file: pieces put in, cut, doubled or changed."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.choice([0, 0, 1, 5, 40, 400]))
        lines = text.splitlines(keepends=True) or [""]
        text = draw.choice(
            [
                text[:at] + draw.choice(SNIPPETS) + text[end:],
                text[:at] + text[end:],
                text[:end] + text[at:],
                text[:at] + chr(draw.randrange(0x300)) + text[at:],
                "".join([*lines, draw.choice(lines)]),
            ]
        )
    return text


@pytest.fixture
def bounded():
    """The process grows by less than 500 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES


@pytest.mark.parametrize("kind", ["text", "values", "overrides"])
def test_a_mutated_configuration_is_whole_or_refused(kind, tmp_path, bounded):
    draw, path, accepted, count = random.Random(kind), tmp_path / "run.yaml", 0, trials(240)
    for _ in range(count):
        data, words = base(draw), []
        if kind == "values":
            for _ in range(draw.randint(1, 3)):
                at = draw.choice([at for at in places(data) if at])
                data = changed(data, at, draw.choice([*VALUES, ...]))
            if draw.random() < 0.3:
                data[draw.choice(["model", "train", "k", "name"])] = draw.choice(
                    [BOMB, {"x": BOMB}]
                )
            found = judged(lambda data=data: parse_config(data))
        else:
            text = yaml.safe_dump(data, sort_keys=False)
            if kind == "text":
                text = mutated_text(draw, text)
            else:
                names = [".".join(map(str, at)) for at in places(data) if at]
                values = ["1", "4", "x", "0.5", *map(str, VALUES[:-8]), *SNIPPETS]
                joint = draw.choice(["=", "=", "=", "=", ".x=", ""])
                words = [f"{draw.choice(names)}{joint}{draw.choice(values)}"]
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            found = judged(lambda words=words: load_config(path, words))
        if found is not None:
            accepted += 1
            check_config(found)
            judged(lambda found=found: storage_url(found.search))
    assert 0 < accepted < count


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "demo", layers=12)


def shown_values(run):
    """Everything the page says of a run, but for the pictures themselves."""
    facts(run), arm_rows(run), verdicts(run), environment_rows(run), certificate_rows(run)
    arm_table(run).csv(), stage_table(run).csv()
    return [t.csv() for part in sections(run) for p in part.pictures for t in p.tables]


def test_a_mutated_artifact_is_read_or_named(run_folder, bounded):
    draw, accepted, count = random.Random(7), 0, trials(280)
    files = sorted(p for p in run_folder.rglob("*") if p.suffix in (".json", ".npz", ".yaml"))
    for _ in range(count):
        file = draw.choice(files)
        before = file.read_bytes()
        if file.suffix == ".json" and draw.random() < 0.8:
            value = json.loads(before)
            value = changed(value, draw.choice(list(places(value))), draw.choice([*VALUES, ...]))
            file.write_text("" if value is ... else json.dumps(value), encoding="utf-8")
        else:
            start = draw.randrange(len(before))
            junk = draw.choice(
                [b"", b"\0", b"\xff", b"[" * 100_000, b"1" * 400, b"{", b"NaN", draw.randbytes(1)]
            )
            file.write_bytes(before[:start] + junk + before[start + draw.choice([0, 1, 50]) :])
        try:
            found = judged(lambda: shown_values(read_run(run_folder)))
            accepted += found is not None
        finally:
            file.write_bytes(before)
    assert 0 < accepted < count
    assert shown_values(read_run(run_folder))


@pytest.mark.parametrize("value", [10**400, 2**63, -(2**70), 1e300])
def test_a_number_no_reader_can_hold_is_named_with_its_key(value, run_folder):
    for name in ("search/result.json", "eval/results.json", "train/main/metrics.json", "env.json"):
        file = run_folder / name
        before = file.read_bytes()
        document = json.loads(before)
        found = [at for at in places(document) if at]
        at = found[len(found) // 2]
        file.write_text(json.dumps(changed(document, at, value)), encoding="utf-8")
        try:
            with pytest.raises(FileError, match=f"{name}: .*{at[0]}.* must be a ") as caught:
                read_run(run_folder)
        finally:
            file.write_bytes(before)
        assert caught.value.path == str(file)
