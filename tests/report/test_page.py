import base64
import csv
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.report_fixture import LAYERS, PARTS, STAGES, TASKS, write_json, write_run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from floe.artifacts.results import Interval, Router, Trial
from floe.errors import FileError
from floe.importance.scores import Scores
from floe.report import build_report, page
from floe.report.arms import curves, looks, outcomes, smooth, tasks
from floe.report.experts import best_so_far
from floe.report.page import sections
from floe.report.run import read_run
from floe.report.scores import chance_overlap, normalised, rankings, sorted_bins
from floe.report.summary import arm_rows, facts, verdicts
from floe.report.tables import (
    Table,
    decimals,
    duration,
    label,
    or_dash,
    overlaps,
    significant,
    size,
)
from floe.report.theme import DARK, LIGHT, render_svg, themed

HOSTILE = 'evil/"model" & \'<script>alert(1)</script>'
PICTURES = (
    "saliency",
    "units",
    "rankings",
    "tuning",
    "search",
    "layers",
    "curves",
    "outcomes",
    "tasks",
    "cost",
    "router",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with hostile names and its report, built once; tests that change it take a copy."""
    folder = write_run(tmp_path_factory.mktemp("built") / "demo", model=HOSTILE)
    assert build_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def fresh(tmp_path):
    return write_run(tmp_path / "demo")


def rows_of(run_dir, name):
    with (run_dir / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return [math.nan if row[name] == "" else float(row[name]) for row in rows]


def artifact(run_dir, *parts):
    return json.loads(run_dir.joinpath(*parts).read_text(encoding="utf-8"))


def edit(run_dir, change, *parts):
    data = artifact(run_dir, *parts)
    change(data)
    write_json(run_dir.joinpath(*parts), data)


class Page(HTMLParser):
    """Tags with attributes, and the ids of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(run_dir):
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_saliency_csv_equals_the_scores(run_dir):
    rows, scores = rows_of(run_dir, "saliency"), Scores.load(run_dir / "score" / "scores.npz")
    selection = artifact(run_dir, "select", "selection.json")
    assert column(rows, "heads, mean Fisher") == scores.head_fisher.mean(axis=1).tolist()
    assert column(rows, "neurons, mean Taylor") == scores.neuron_taylor.mean(axis=1).tolist()
    assert column(rows, "adapter Fisher") == scores.adapter_fisher.tolist()
    assert column(rows, "masked heads, share") == selection["paper"]["masked_head_fraction"]
    assert column(rows, "layer score") == selection["layer_scores"]
    chosen = [k for k, row in enumerate(rows) if row["chosen"] == "1"]
    theirs = [k for k, row in enumerate(rows) if row["chosen by the paper's masks"] == "1"]
    assert (chosen, theirs) == (selection["layers"], selection["paper"]["layers"])


def test_unit_csvs_equal_the_scores(run_dir):
    scores = Scores.load(run_dir / "score" / "scores.npz")
    heads = column(rows_of(run_dir, "units_heads"), "fisher")
    assert heads == scores.head_fisher.ravel().tolist()
    neurons = rows_of(run_dir, "units_neurons")
    totals = np.array(column(neurons, "mean fisher")) * np.array(column(neurons, "neurons in bin"))
    np.testing.assert_allclose(
        totals.reshape(LAYERS, -1).sum(1), scores.neuron_fisher.sum(1), rtol=1e-12
    )


def test_ranking_csv_equals_the_selection(run_dir):
    rows, selection = rows_of(run_dir, "rankings"), artifact(run_dir, "select", "selection.json")
    order = sorted(range(LAYERS), key=column(rows, "rank").__getitem__)
    theirs = sorted(range(LAYERS), key=column(rows, "rank by the paper's masks").__getitem__)
    assert (order, theirs) == (selection["ranking"], selection["paper"]["ranking"])
    observed = [k for k, row in enumerate(rows_of(run_dir, "overlap")) if row["observed"] == "1"]
    assert observed == [selection["agreement"]["overlap"]]


def test_search_csv_equals_the_trials(run_dir):
    rows, result = rows_of(run_dir, "search"), artifact(run_dir, "search", "result.json")
    assert [row["state"] for row in rows] == [t["state"] for t in result["trials"]]
    values = [math.nan if t["value"] is None else t["value"] for t in result["trials"]]
    np.testing.assert_equal(column(rows, "value"), values)
    best = result["trials"][result["best_trial"]]["value"]
    assert float(rows[-1]["best so far"]) == best


def test_curve_and_outcome_csvs_equal_the_artifacts(run_dir):
    metrics = artifact(run_dir, "train", "random-41", "metrics.json")
    rows = [row for row in rows_of(run_dir, "curves") if row["arm"] == "random-41"]
    for kind in ("train_loss", "validation_loss"):
        mine = [row for row in rows if row["curve"] == kind]
        points = list(zip(column(mine, "step"), column(mine, "loss"), strict=True))
        assert points == [tuple(pair) for pair in metrics[kind]]
    arms = artifact(run_dir, "eval", "results.json")["arms"]
    for row in rows_of(run_dir, "outcomes"):
        one = arms[row["arm"]][row["measure"]]
        got = [float(row[key]) for key in ("value", "low", "high")]
        assert got == [one["value"], one["low"], one["high"]]
        assert int(row["rows"]) == one["rows"]
    by_task = rows_of(run_dir, "tasks")
    assert len(by_task) == len(TASKS) * len(arms) * 2
    for row in by_task:
        assert (
            float(row["value"]) == arms[row["arm"]]["by_task"][row["task"]][row["measure"]]["value"]
        )


def test_cost_router_tuning_stage_csvs_equal_the_artifacts(run_dir):
    profile = artifact(run_dir, "profile", "profile.json")["points"]
    points = [row for row in rows_of(run_dir, "cost") if row["source"] == "profile"]
    assert column(points, "seconds per step") == [p["seconds_per_step"] for p in profile]
    assert column(points, "peak memory bytes") == [p["peak_memory_bytes"] for p in profile]
    modules = artifact(run_dir, "eval", "router.json")["modules"]
    routers = rows_of(run_dir, "router")
    assert column(routers, "load entropy") == [m["load_entropy"] for m in modules]
    assert column(routers, "usage 3") == [m["usage"][3] for m in modules]
    assert column(routers, "collapsed") == [float(max(m["usage"]) > 0.9) for m in modules]
    tuning = artifact(run_dir, "select", "selection.json")["tuning"]
    assert column(rows_of(run_dir, "tuning"), "residual after") == [
        t["residual_after"] for t in tuning
    ]
    stages = {row["stage"]: float(row["seconds"]) for row in rows_of(run_dir, "stages")}
    assert list(stages.items()) == list(STAGES.items())  # in the pipeline's order


def test_headline_names_the_chosen_layers_and_the_intervals(run_dir):
    run = read_run(run_dir)
    shown = {fact.name: f"{fact.value} {fact.note}" for fact in facts(run)}
    assert shown["adapted layers"].startswith("8 of 30")
    assert "27 % of adapting all" in shown["trainable parameters"]
    loss = artifact(run_dir, "eval", "results.json")["arms"]["main"]["loss"]
    expected = f"[{loss['low']:.3f}, {loss['high']:.3f}] over 392 rows"
    assert expected in shown["loss, nats per token"]
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Differences whose intervals overlap are not established" in text
    assert expected.split(" over")[0] in text


def test_rows_that_were_lost_stand_in_the_header(run_dir):
    header, _, rest = (run_dir / "report.html").read_text(encoding="utf-8").partition("</header>")
    shown = {name: (p["summary"] in header, p["summary"] in rest) for name, p in PARTS.items()}
    assert shown == {"data.train": (True, True), "data.test": (False, True)}


def test_verdicts_follow_the_paired_differences(fresh):
    def change(results):
        gaps = {"base": (1, 2), "all": (-0.2, -0.1), "even": (0.001, 0.1), "masks": (-0.1, 0.001)}
        for arm, (low, high) in gaps.items():
            results["arms"][arm]["loss_minus_main"].update(
                value=(low + high) / 2, low=low, high=high
            )

    edit(fresh, change, "eval", "results.json")
    better, worse, still_open = verdicts(read_run(fresh))[0].split("; ")
    assert "better than base, even and random-42 (the paired interval excludes zero)" in better
    assert "worse than all" in worse
    assert "masks" in still_open


def test_verdicts_follow_the_intervals_where_nothing_is_paired(fresh):
    def change(results):
        arms = results["arms"]
        for arm in arms.values():
            del arm["loss_minus_main"]
        arms["main"]["loss"].update(value=2.0, low=1.9, high=2.1)
        arms["all"]["loss"].update(value=1.5, low=1.4, high=1.89)
        arms["even"]["loss"].update(value=2.5, low=2.11, high=2.6)
        arms["masks"]["loss"].update(value=2.2, low=2.1, high=2.3)

    edit(fresh, change, "eval", "results.json")
    loss = verdicts(read_run(fresh))[0]
    better, worse, still_open = loss.split("; ")
    assert "better than base and even" in better
    assert "worse than all" in worse
    assert "masks" in still_open


def test_pictures_draw_the_numbers_of_their_tables(run_dir):
    run = read_run(run_dir)
    with themed(LIGHT):
        axes = outcomes(run).draw(LIGHT).axes
        lines = rankings(run).draw(LIGHT).axes[0].lines
    for ax, what in zip(axes, ("loss", "loss_minus_main", "accuracy"), strict=True):
        dots = [float(line.get_xdata()[0]) for line in ax.lines if line.get_gid() == "value"]
        arms = [arm for arm in run.arms if (arm, what) != ("main", "loss_minus_main")]
        assert dots == [getattr(run.evaluation.arms[arm], what).value for arm in arms]
    slopes = [tuple(line.get_ydata()) for line in lines if len(line.get_ydata()) == 2]
    theirs = list(run.choice.paper.ranking)
    expected = [(i, theirs.index(k) + 1) for i, k in enumerate(run.choice.ranking, start=1)]
    assert slopes == expected


def test_every_picture_is_there_as_svg_png_and_csv(run_dir):
    images = page_of(run_dir).all("img")
    assert len(images) == len(PICTURES)
    for key in PICTURES:
        png = (run_dir / "report" / f"{key}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
    assert all(image["alt"] and image["src"].startswith("data:image/svg") for image in images)
    links = {a["href"] for a in page_of(run_dir).all("a") if a["href"].startswith("report/")}
    written = {f"report/{path.name}" for path in (run_dir / "report").iterdir()}
    assert links == written | {"report/"}


def test_every_name_a_report_can_write_is_known():
    sources = "".join(path.read_text() for path in Path(page.__file__).parent.glob("*.py"))
    found = re.findall(r'\bPicture\(\s*key="(\w+)"|\bTable\(\s*"(\w+)"', sources)
    assert {name for pair in found for name in pair if name} == set(page._NAMES.split())


def test_arms_that_chose_by_projection_or_size_are_drawn(fresh):
    metrics = artifact(fresh, "train", "main", "metrics.json")
    first, second = metrics["layers"][:2]
    modules = {str(first): ["up_proj"], str(second): ["gate_proj", "down_proj"]}
    edit(fresh, lambda data: data.update(layers=[first, second], modules=modules), *MAIN)
    sizes = {str(first): [4, 2], str(second): [16, 4]}
    there = ("train", "even", "metrics.json")
    edit(fresh, lambda data: data.update(layers=[first, second], sizes=sizes), *there)
    build_report(fresh)
    found = {(row["arm"], int(row["layer"])): row for row in rows_of(fresh, "placements")}
    assert found["main", second]["projections"] == "gate_proj down_proj"
    assert found["main", first]["rank"] == str(metrics["rank"])
    assert (found["even", second]["rank"], found["even", second]["experts"]) == ("16", "4")
    run = read_run(fresh)
    layers, size, *_ = facts(run)
    assert layers.value == f"2 of {LAYERS}"
    assert layers.note.endswith("; 3 projections")
    assert size.note.startswith("rank")
    (picture,) = [p for part in sections(run) for p in part.pictures if p.key == "placements"]
    figure = picture.draw(LIGHT)
    marks = [set(line.get_xdata()) for line in figure.axes[0].lines]
    assert marks == [
        set(range(LAYERS)),
        {second},
        set(range(LAYERS)),
        {second},
        set(range(LAYERS)),
        {first},
    ]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [4, 16]


@pytest.mark.parametrize(
    "wrong", [{"modules": {"99": ["up_proj"]}}, {"sizes": {"x": [1, 2]}}, {"modules": 3}]
)
def test_placements_that_cannot_be_are_named(fresh, wrong):
    edit(fresh, lambda data: data.update(wrong), *MAIN)
    with pytest.raises(FileError, match=r"metrics\.json: (modules|sizes) must "):
        read_run(fresh)


def test_page_refers_to_nothing_outside_itself(run_dir):
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    assert "@import" not in text
    sources = [attrs[key] for _, attrs in page.tags for key in ("src", "srcset") if key in attrs]
    assert len(sources) == 2 * len(PICTURES)
    for source in sources:
        svg = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
        hrefs = re.findall(r'href="([^"]*)"', svg)
        assert all(href.startswith(("#", "data:image/png;base64,")) for href in hrefs)
        assert "<script" not in svg
    targets = [a["href"] for a in page.all("a")]
    assert all(target.startswith(("#", "report/")) for target in targets)
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    )
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors


def test_names_are_escaped(run_dir):
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "evil/&#34;model&#34; &amp; &#39;&lt;script&gt;alert(1)" in text
    run = read_run(run_dir)
    svg = render_svg(tasks(run)[0].draw, LIGHT)
    assert "quote &quot;and&quot; &amp; ampersand" in svg or 'quote "and" &amp; ampersand' in svg
    assert "$x_1$ math" in svg


def test_equal_artifacts_give_equal_bytes_without_torch(run_dir, tmp_path):
    copy = write_run(tmp_path / "demo", model=HOSTILE)
    code = (
        "import sys; from floe.report import build_report; build_report(sys.argv[1]);"
        "bad = {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True)
    page = Path("report.html")
    assert (copy / page).read_bytes() == (run_dir / page).read_bytes()
    names = sorted(path.name for path in (run_dir / "report").iterdir())
    assert names == sorted(path.name for path in (copy / "report").iterdir())
    for name in names:
        same = (copy / "report" / name).read_bytes() == (run_dir / "report" / name).read_bytes()
        assert same, name


@pytest.mark.parametrize(
    "name", ["config.yaml", "env.json", "score/scores.npz", "select/selection.json"]
)
def test_missing_required_artifact_is_named(fresh, name):
    (fresh / name).unlink()
    with pytest.raises(FileError, match="is missing") as caught:
        build_report(fresh)
    assert caught.value.path == str(fresh / name)
    assert not (fresh / "report.html").exists()
    assert not (fresh / "report").exists()


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileError, match="is not a folder"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "section", "line"),
    [
        ("search", "search", "The search was not run"),
        ("train", "training", "No training was run"),
        ("eval/results.json", "results", "The evaluation was not run"),
        ("eval/router.json", "router", "Router statistics were not collected"),
    ],
)
def test_missing_optional_artifact_leaves_one_line(fresh, name, section, line):
    path = fresh / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    (part,) = [part for part in sections(read_run(fresh)) if part.key == section]
    assert part.missing.startswith(line)
    assert not part.pictures


def test_missing_baselines_profile_and_tuning_are_said(fresh):
    for arm in ("all", "masks", "even", "random-41", "random-42"):
        shutil.rmtree(fresh / "train" / arm)
    (fresh / "profile" / "profile.json").unlink()
    edit(fresh, lambda data: data.update(tuning=[], tuned=False), "select", "selection.json")
    parts = {part.key: part for part in sections(read_run(fresh))}
    assert "No baseline was trained" in parts["training"].missing
    assert "profile was not run" in parts["cost"].missing
    assert "Mask tuning was not run" in parts["ranking"].missing
    assert [picture.key for picture in parts["ranking"].pictures] == ["rankings"]


def test_masks_policy_is_not_compared_with_itself(fresh):
    def change(data):
        data["policy"] = "masks"

    edit(fresh, change, "select", "selection.json")
    parts = {part.key: part for part in sections(read_run(fresh))}
    assert "no second ranking" in parts["ranking"].missing
    assert [picture.key for picture in parts["ranking"].pictures] == ["tuning"]


def test_selection_alone_gives_a_report_and_drops_stale_files(run_dir, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(run_dir, folder)
    for stage in ("search", "train", "eval", "profile"):
        shutil.rmtree(folder / stage)
    edit(folder, lambda data: data.update(cpu="broken \ud800"), "env.json")
    for name in ("notes.txt", "mine.png", "table.csv"):
        (folder / "report" / name).write_text("mine")
    build_report(folder)
    left = {path.name for path in (folder / "report").iterdir()}
    assert not {"curves.png", "curves.csv", "router.png", "outcomes.csv"} & left
    assert {"notes.txt", "mine.png", "table.csv", "saliency.png", "rankings.csv"} <= left
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Neither training nor evaluation was run" in text


SELECTION = ("select", "selection.json")
MAIN = ("train", "main", "metrics.json")
SEARCH, PROFILE = ("search", "result.json"), ("profile", "profile.json")
RESULTS, ROUTER = ("eval", "results.json"), ("eval", "router.json")


@pytest.mark.parametrize(
    ("parts", "change", "message"),
    [
        (("data.json",), lambda d: d["parts"]["data.train"].pop("summary"), "summary is missing"),
        (SELECTION, lambda d: d.pop("layers"), "layers is missing"),
        (SELECTION, lambda d: d.update(layers=[0, 30]), r"layers must be .*\[0, 30\)"),
        (SELECTION, lambda d: d["ranking"].pop(), "ranking must be a permutation"),
        (SELECTION, lambda d: d.update(layer_scores=[1.0]), "a list of 30 finite numbers"),
        (SELECTION, lambda d: d["paper"].pop("ranking"), "paper.ranking is missing"),
        (SEARCH, lambda d: d["trials"][2].update(state="lost"), r"trials\[2\].state must be"),
        (MAIN, lambda d: d.update(steps="200"), "steps must be a whole"),
        (MAIN, lambda d: d.update(train_loss=[[1]]), "train_loss must be"),
        (RESULTS, lambda d: d["arms"].update(main=3), "arms.main must be an object"),
        (ROUTER, lambda d: d["modules"][0].update(layer=99), r"in \[0, 30\)"),
        (PROFILE, lambda d: d["points"][0].pop("layers"), r"points\[0\].layers is missing"),
    ],
)
def test_damaged_artifact_names_file_and_key(fresh, parts, change, message):
    edit(fresh, change, *parts)
    with pytest.raises(FileError, match=message) as caught:
        read_run(fresh)
    assert caught.value.path == str(fresh.joinpath(*parts))


def test_broken_json_leaves_the_earlier_report(run_dir, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(run_dir, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "eval" / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(FileError, match="cannot be read as JSON"):
        build_report(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before[folder / "eval" / "results.json"] = b"{"
    assert after == before


def test_unusual_runs_still_draw(tmp_path):
    """Diverged losses, no intervals, names from other scripts and broken ones, constant scores."""
    folder = write_run(tmp_path / "demo", layers=12)

    def diverge(data):
        data["train_loss"][-3:] = [[190, math.nan], [195, None], [200, math.inf]]
        data.update(peak_memory_bytes=None, seed=None)

    def bare(data):
        for arm in data["arms"].values():
            arm["loss"].update(low=None, high=None)
            arm["by_task"] = {"問答 \x07 \ud800": {"accuracy": arm["accuracy"]}}
        data["arms"]["base"].pop("accuracy")
        data["arms"]["even"]["loss"]["value"] = math.nan

    def flat(data):
        data["layer_scores"] = [0.0] * 12
        data["paper"].update(masked_head_fraction=None)

    def lost(data):
        for trial in data["trials"]:
            trial.update(state="failed", value=None)

    edit(folder, lost, "search", "result.json")
    edit(folder, diverge, "train", "main", "metrics.json")

    def silent(data):
        data.update(train_loss=[], validation_loss=[])

    edit(folder, silent, "train", "even", "metrics.json")
    edit(folder, bare, "eval", "results.json")
    edit(folder, flat, "select", "selection.json")
    edit(folder, lambda data: data["modules"][0].update(usage=[1.0]), "eval", "router.json")
    run = read_run(folder)
    for picture in (picture for part in sections(run) for picture in part.pictures):
        svg = render_svg(picture.draw, DARK)
        ElementTree.fromstring(svg.encode("utf-8"))
        for table in picture.tables:
            assert table.csv().count("\n") > len(table.rows)
    assert arm_rows(run)[0]["loss_interval"] == "no interval"
    assert "問答 \ufffd \ufffd" in render_svg(tasks(run)[0].draw, LIGHT)


def test_many_tasks_show_the_arms_that_matter(fresh):
    def change(data):
        for arm in data["arms"].values():
            one = arm["by_task"]["rte"]
            arm["by_task"] = {f"task {i:02d}": one for i in range(20)}

    edit(fresh, change, "eval", "results.json")
    run = read_run(fresh)
    picture = tasks(run)[0]
    assert "Shown: base, main, all;" in picture.caption
    assert {row[1] for row in picture.tables[0].rows} == set(run.evaluation.arms)


def test_every_arm_looks_different(fresh):
    for theme in (LIGHT, DARK):
        found = looks(read_run(fresh), theme).values()
        assert len({(look.color, look.marker) for look in found}) == len(found)
        assert len({look.marker for look in found if look.marker not in "dD"}) == len(found) - 2


def relative_luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((relative_luminance(one), relative_luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_colours_meet_wcag_contrast(theme):
    assert contrast(theme.ink, theme.paper) >= 7
    for color in (theme.muted, theme.chosen):
        assert contrast(color, theme.paper) >= 4.5, color
    for color in (theme.contrast, *theme.others):
        assert contrast(color, theme.paper) >= 3, color
    steps = [contrast(color, theme.paper) for color in theme.ramp]
    assert steps == sorted(steps)
    assert steps[-1] > 7


@pytest.mark.parametrize(("layers", "first", "second"), [(6, 2, 3), (5, 5, 2), (4, 1, 1)])
def test_chance_overlap_counts_every_pair_of_sets(layers, first, second):
    fixed = set(range(first))
    sets = list(itertools.combinations(range(layers), second))
    counts = [sum(len(fixed & set(s)) == k for s in sets) for k in range(min(first, second) + 1)]
    expected = [count / len(sets) for count in counts]
    np.testing.assert_allclose(chance_overlap(layers, first, second), expected, atol=1e-15)


@given(arrays(np.float64, 7, elements=st.floats(0, 1e12)))
def test_normalised_rows_keep_the_order(values):
    row, log = normalised(values)
    assert row.min() == 0
    assert row.max() in (0, 1)
    assert (np.diff(row[np.argsort(values, kind="stable")]) >= 0).all()
    positive = values[values > 0]
    assert log == bool(positive.size and positive.max() > 20 * positive.min())


def test_rows_turn_logarithmic_beyond_a_factor_of_twenty():
    assert normalised(np.array([1.0, 20.0]))[1] is False
    row, log = normalised(np.array([0.0, 1.0, 10.0, 100.0]))
    assert log is True
    assert row.tolist() == [0, 0, 0.5, 1]


def test_sorted_bins_average_the_largest_first():
    bins, sizes = sorted_bins(np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 0.0]]))
    assert bins.tolist() == [[3, 2, 1], [5, 0, 0]]
    assert sizes == [1, 1, 1]
    bins, sizes = sorted_bins(np.arange(130.0)[None])
    assert sum(sizes) == 130
    assert bins[0, 0] == 128  # mean of 127..129
    assert (np.diff(bins) < 0).all()


def test_best_so_far_counts_complete_trials_only():
    states = [
        ("failed", None),
        ("complete", 2.0),
        ("pruned", 1.0),
        ("complete", math.nan),
        ("repeat", 0.5),
        ("complete", 1.5),
        ("complete", 1.7),
    ]
    trials = tuple(Trial(i, 2, 2, state, value, None) for i, (state, value) in enumerate(states))
    assert best_so_far(trials) == [None, 2.0, 2.0, 2.0, 2.0, 1.5, 1.5]


@pytest.mark.parametrize(
    ("usage", "load", "mutual", "flags"),
    [
        ([0.25] * 4, 1.0, 0.02, (False, False)),
        ([0.25] * 4, 1.0, 0.0099, (False, True)),
        ([0.9, 0.1], 0.5, 0.01, (False, False)),
        ([0.91, 0.09], 0.5, 0.01, (True, False)),
        ([0.8, 0.2], 0.49, 0.01, (True, False)),
        ([1.0], 1.0, 0.0, (False, False)),
    ],
)
def test_router_flags(usage, load, mutual, flags):
    router = Router(0, "down_proj", np.array(usage), load, load - mutual, mutual)
    assert (router.collapsed, router.unspecialised) == flags


def test_smooth_is_a_centred_mean():
    assert smooth(np.array([1.0, 2.0, 6.0])).tolist() == [1.5, 3.0, 4.0]
    flat = smooth(np.full(100, 2.5))
    assert flat.tolist() == [2.5] * 100
    assert smooth(np.arange(100.0))[50] == 50


def test_intervals_that_touch_overlap():
    def interval(low, high):
        return Interval(0.0, low, high, 10)

    assert overlaps(interval(0, 1), interval(1, 2))
    assert overlaps(interval(1, 2), interval(0, 1))
    assert not overlaps(interval(0, 1), interval(1.001, 2))
    assert overlaps(interval(0, 1), Interval(0.0, None, None, 10)) is None
    assert overlaps(None, interval(0, 1)) is None


def test_numbers_read_as_text():
    assert [significant(v) for v in (0.0, 0.01234, 45123.4, 1.2e-7, 3.0e9)] == [
        "0",
        "0.0123",
        "45,123",
        "1.20e-07",
        "3.00e+09",
    ]
    assert [duration(v) for v in (0.0454, 8.24, 185, 7800)] == [
        "45 ms",
        "8.2 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert (decimals(1.0), or_dash(decimals, None), decimals(math.nan)) == ("1.000", "–", "nan")
    assert (size(2**29), size(3 * 2**30)) == ("512 MiB", "3.00 GiB")
    assert label("a\x00b\ud800") == "a\ufffdb\ufffd"
    assert len(label("x" * 100)) == 30


@given(st.floats())
def test_csv_floats_survive(value):
    text = Table("t", "a", ((value,),)).csv().splitlines()[1]
    assert float(text) == value or (math.isnan(value) and math.isnan(float(text)))


def test_local_model_shows_its_name_only(tmp_path):
    folder = write_run(tmp_path / "demo", model="/home/someone/models/tiny")
    assert read_run(folder).model == "tiny"


def test_passwords_in_urls_are_not_shown(fresh):
    url = "postgresql://floe:s3cret@host/db"
    (fresh / "config.yaml").write_text(f"search: {{storage: {url}}}\nname: a:b@c\n")
    assert read_run(fresh).config == (
        "search: {storage: postgresql://floe:***@host/db}\nname: a:b@c\n"
    )


def test_curves_caption_states_the_seeds(fresh):
    edit(fresh, lambda data: data.update(seed=42), "train", "even", "metrics.json")
    assert "training seed 41, 42: n = 1" in curves(read_run(fresh)).caption


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for path in map(shutil.which, names) if path), None)
    if executable is None:
        pytest.skip(f"Chromium is not installed: looked for {', '.join(names)}")
    sync_api = pytest.importorskip("playwright.sync_api")
    switches = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=switches)
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_opens_in_a_browser(run_dir, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run_dir / "report.html").as_uri())
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    widths = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    chosen = page.evaluate("[...document.images].map(i => i.currentSrc === i.src)")
    page.close()
    assert len(widths) == len(PICTURES)
    assert min(widths) > 0
    assert chosen == [scheme == "light"] * len(PICTURES)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [
        (run_dir / "report.html").as_uri()
    ]
    assert sizes[0] <= width == sizes[1]
