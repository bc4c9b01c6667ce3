"""The YAML of a run: every mistake is found before anything starts, and named with its place."""

import json
import time
import traceback

import pytest
import yaml

from floe import FileError, RunConfig, load_config
from floe.config import SearchConfig, storage_url
from floe.config_file import TEMPLATE, dump_config, parse_config
from floe.errors import hide_secrets

MINIMAL = {"model": {"path": "some/model"}, "data": {"train": {"hub": "some/data"}}}


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return path


def change(**sections):
    """MINIMAL with ``section={key: value}`` merged in."""
    merged = json.loads(json.dumps(MINIMAL))
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values if isinstance(values, dict) else values
    return merged


def test_defaults_are_the_paper_s(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.adapter.alpha, config.adapter.dropout, config.adapter.r) == (32.0, 0.05, 8)
    assert config.adapter.target_modules is None
    train = config.train
    assert (train.learning_rate, train.batch_size, train.grad_accum, train.seed) == (2e-4, 1, 8, 41)
    assert (train.warmup_ratio, train.schedule, train.epochs, train.weight_decay) == (
        0.03,
        "cosine",
        1.0,
        0.0,
    )
    assert config.data.max_length == 1024
    assert (config.search.trials, config.search.rank, config.search.num_experts) == (
        30,
        (2, 32, 2),
        (2, 4, 1),
    )


@pytest.mark.parametrize("layers", [7, 1, 0.25, 1.0, {"params": 10_000_000}], ids=str)
def test_a_config_survives_writing_and_reading(layers, tmp_path):
    config = parse_config(change(select={"layers": layers}, name="run.2"))
    assert config.select.layers == layers
    assert type(config.select.layers) is type(layers)
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert type(again.select.layers) is type(layers)


def test_the_template_of_init_is_valid(tmp_path):
    config = load_config(TEMPLATE)
    assert [b.name for b in config.baselines] == ["all", "random"]
    assert config.train.learning_rate == 2e-4


def test_the_schema_is_generated_and_closed():
    schema = RunConfig.model_json_schema()
    assert set(schema["required"]) == {"model", "data"}
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    json.dumps(schema)


BAD = {
    "unknown section": (change(trian={}), "trian: unknown setting; did you mean 'train'?"),
    "unknown key": (
        change(adapter={"num_expert": 2}),
        "adapter.num_expert: unknown setting; did you mean 'num_experts'?",
    ),
    "unknown nested key": (
        change(data={"train": {"hub": "x", "spilt": "a"}}),
        "data.train.spilt: unknown setting; did you mean 'split'?",
    ),
    "nothing near": (
        change(adapter={"zzzz": 2}),
        "adapter.zzzz: unknown setting; known: adapter_dtype, alpha",
    ),
    "missing section": ({"model": {"path": "x"}}, "data: Field required"),
    "rank 0": (
        change(adapter={"r": 0}),
        "adapter.r: Input should be greater than or equal to 1, got 0",
    ),
    "yes for a number": (
        change(adapter={"r": True}),
        "adapter: .*r must not be true or false, got True",
    ),
    "yes in a range": (change(search={"rank": [True, 4, 1]}), "search: .*rank must not be true"),
    "rank text": (change(adapter={"r": "many"}), "adapter.r: Input should be a valid integer"),
    "nan alpha": (change(adapter={"alpha": float("nan")}), "adapter.alpha: .*, got nan"),
    "dropout 1": (
        change(adapter={"dropout": 1}),
        "adapter.dropout: Input should be less than 1, got 1",
    ),
    "nan dropout": (change(adapter={"dropout": float("nan")}), "adapter.dropout: .*, got nan"),
    "infinite rate": (
        change(train={"learning_rate": float("inf")}),
        "train.learning_rate: .*, got inf",
    ),
    "nan decay": (change(train={"weight_decay": float("nan")}), "train.weight_decay: .*, got nan"),
    "fraction 0": (
        change(warmup={"fraction": 0}),
        "warmup.fraction: Input should be greater than 0, got 0",
    ),
    "budget": (
        change(select={"budget": 1.5}),
        "select.budget: Input should be less than or equal to 1, got 1.5",
    ),
    "preset": (change(select={"preset": "globl"}), "select.preset: .*'global'.*got 'globl'"),
    "deleted preset": (
        change(select={"preset": "block"}),
        "select.preset: .*'global', 'exact', 'paper_layer' or 'alg1_literal', got 'block'",
    ),
    "deleted policy": (
        change(select={"policy": "gate_fisher"}),
        "select.policy: .*'gate_fisher_diagonal'.*got 'gate_fisher'",
    ),
    "layers 0": (change(select={"layers": 0}), "select.layers"),
    "layers 1.5": (change(select={"layers": 1.5}), "select.layers"),
    "layers key": (change(select={"layers": {"parms": 3}}), "select.layers"),
    "two sources": (
        change(data={"train": {"hub": "x", "path": "y"}}),
        "data.train: .*exactly one of path and hub",
    ),
    "no source": (change(data={"train": {}}), "data.train: .*exactly one of path and hub"),
    "name is a path": (change(name="../up"), "name: String should match pattern"),
    "name is absolute": (change(name="/etc"), "name: String should match pattern"),
    "arm main": (
        change(baselines=[{"name": "main", "policy": "even"}]),
        "names must differ and not be 'main' or 'base', got .'main'.",
    ),
    "two arms": (
        change(baselines=[{"name": "a", "policy": "even"}] * 2),
        "names must differ .*got .'a'.",
    ),
    "arm is a path": (
        change(baselines=[{"name": "a/b", "policy": "even"}]),
        "baselines.0.name: String should match pattern",
    ),
    "projections of a policy of layers": (
        change(select={"policy": "even", "choose": "modules"}),
        "select: .*choose: modules needs a policy that scores projections, .*got 'even'",
    ),
    "sizes of a schedule": (
        change(baselines=[{"name": "a", "policy": "lisa", "choose": "sizes"}]),
        "baselines.0: .*policy 'lisa' adapts all layers: choose must be layers",
    ),
    "sizes without a gain": (
        change(select={"choose": "sizes"}, search={"trials": 2}),
        "choose: sizes needs select.r0, or at least 3 search.trials to fit it to, got 2",
    ),
    "range": (
        change(search={"rank": [8, 2, 2]}),
        "search: .*rank must be .low, high, step. with low <= high, got .8, 2.",
    ),
    "step 0": (change(search={"num_experts": [2, 4, 0]}), "search.num_experts.2: .*, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_named_with_its_place(name, tmp_path):
    data, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        load_config(write(tmp_path, data))


def test_every_problem_is_listed_at_once():
    bad = change(adapter={"r": 0, "alphas": 1}, train={"batch_size": -2})
    with pytest.raises(ValueError, match="the configuration has 3 problems:\n") as caught:
        parse_config(bad)
    assert len(str(caught.value).splitlines()) == 4


def test_overrides_are_yaml_values_at_dotted_places(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path,
        [
            "adapter.r=3",
            "select.layers={params: 50}",
            "train.learning_rate=1e-3",
            "name=other",
            "data.train.limit=7",
            "adapter.target_modules=[up_proj]",
            "data.template=",
            "model.revision='1.0'",
        ],
    )
    assert config.adapter.r == 3
    assert config.select.layers == {"params": 50}
    assert config.train.learning_rate == 1e-3
    assert (config.name, config.data.train.limit) == ("other", 7)
    assert config.adapter.target_modules == ["up_proj"]
    assert config.data.template is None
    assert config.model.revision == "1.0"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("adapter.r", "an override must read a.b=value, got 'adapter.r'"),
        ("=3", "an override must read a.b=value, got '=3'"),
        ("name.x=3", "override 'name.x=3': 'name' is not a section"),
        ("adapter.rr=3", "adapter.rr: unknown setting"),
        ("adapter.r=[", "the value cannot be read as YAML"),
        ("adapter.r=" + "[" * 1200, "the value cannot be read as YAML"),
        ("adapter.r=!!python/object/apply:os.getcwd []", "the value cannot be read as YAML"),
        (".r=3", "unknown setting"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_overrides_are_named(override, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        load_config(write(tmp_path, change(name="x")), [override])


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch ran']",
        "model: !!python/name:os.system",
        "a: [",
        "[" * 1200,
        "a: b: c",
        "\0",
        "- a",
        "text",
        "",
    ],
    ids=lambda t: t[:12] or "empty",
)
def test_files_that_are_no_settings_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(
        FileError, match=r"cannot be read as YAML|must hold a mapping of settings"
    ) as caught:
        load_config(path)
    assert caught.value.path == str(path)
    assert not (tmp_path / "ran").exists()


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot be read as YAML: .*No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FileError, match="cannot be read as YAML"):
        load_config(tmp_path / "bytes.yaml")


def test_relative_files_are_found_beside_the_config(tmp_path, monkeypatch):
    for name in ("train.jsonl", "test.jsonl", "general.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "weights").mkdir()
    data = {
        "model": {"path": "weights"},
        "data": {
            "train": {"path": "train.jsonl"},
            "test": {"path": "./test.jsonl"},
            "validation": {"path": "missing.jsonl"},
        },
        "score": {"taylor_data": {"path": "general.jsonl"}},
    }
    path = write(tmp_path, data)
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.model.path == str(tmp_path / "weights")
    assert config.data.train.path == str(tmp_path / "train.jsonl")
    assert config.data.test.path == str(tmp_path / "test.jsonl")
    assert config.data.validation.path == "missing.jsonl"  # left for the reader to report
    assert config.score.taylor_data.path == str(tmp_path / "general.jsonl")
    assert load_config(path, ["data.train.path=/abs/x.jsonl"]).data.train.path == "/abs/x.jsonl"
    assert load_config(write(tmp_path, MINIMAL)).model.path == "some/model"  # a hub name stays one


def test_settings_cannot_be_changed_after_reading():
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.adapter.r = 3


def test_the_configuration_knows_every_policy_and_score():
    from typing import get_args

    from floe.config import Schedule, SelectConfig
    from floe.selection.masks.determine import PRESETS
    from floe.selection.policies import POLICIES
    from floe.selection.ranking import How
    from floe.training.layer_schedule import SCHEDULES

    schema = RunConfig.model_json_schema()["$defs"]
    for section, others in (("SelectConfig", ()), ("Baseline", get_args(Schedule))):
        listed = schema[section]["properties"]["policy"]["enum"]
        assert set(listed) == {*POLICIES, *others}
    assert get_args(SelectConfig.model_fields["score"].annotation) == (*get_args(How), "path")
    assert set(get_args(SelectConfig.model_fields["preset"].annotation)) == set(PRESETS)
    assert set(get_args(Schedule)) == set(SCHEDULES)


REFUSED = {  # text -> what the one line says
    "a section twice": (
        "train: {epochs: 3}\nsearch: {trials: 0}\ntrain: {batch_size: 2}",
        "line 3: 'train' occurs twice, first in line 1",
    ),
    "a key twice": ("train:\n  epochs: 3\n  'epochs': 4", "line 3: 'epochs' occurs twice"),
    "a merge twice": ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "line 2: '<<' occurs twice"),
    "bool": ("model: !!bool x", "line 1: this is not of the type !!bool"),
    "no int": ("model: !!int ''", "line 1: this is not of the type !!int"),
    "no float": ("name: x\nmodel: !!float ''", "line 2: this is not of the type !!float"),
    "null that is none": ("model: !!null x", "line 1: this is another !!null"),
    "a date by its tag": ("model: !!timestamp x", "line 1: tags are not allowed"),
    "a date": ("model: {revision: 2026-01-02}", "line 1: quote a date"),
    "a set": ("model: !!set {x}", "line 1: tags are not allowed"),
    "octal": ("warmup: {max_steps: 010}", "line 1: this is another !!int than it looks"),
    "sexagesimal": ("warmup: {max_steps: 1:30}", "line 1: this is another !!int than it looks"),
    "400 digits": ("adapter: {r: " + "1" * 400 + "}", "line 1: a number must have at most 64"),
    "long sexagesimal": ("a: " + "1:" * 200_000 + "1", "line 1: a number must have at most 64"),
    "deep": ("a: " + "[" * 100_000, "line 1: values must be nested at most 32 deep"),
    "deep through aliases": (
        "a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*a" + "]" * 20,
        "line 2: values must be nested at most 32 deep",
    ),
    "inside itself": ("a: &a [*a]", "line 1: the alias names no value before it"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: there must be one document"),
    "a number as a key": ("1: x", "line 1: a setting's name must be text"),
    "a list as a key": ("? [a]\n: x", "line 1: a setting's name must be text"),
    "half a pair": ('name: "\\ud800"', "line 1: "),
    "an escaped NUL": ('output_dir: "a\\0b"', "line 1: text must not hold NUL"),
    "large": ("# " + "x" * (1 << 20), "it must be at most 1,048,576 characters long"),
    "many values": ("a: [" + "1," * 20_000 + "]", "at most 20,000 values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_yaml_would_bend_is_refused_in_one_line(name, tmp_path):
    text, message = REFUSED[name]
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=f"cannot be read as YAML: .*{message}") as caught:
        load_config(path)
    assert len(str(caught.value)) < 300
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as YAML") as caught:
        load_config(path, [f"model.path={text}"])
    assert len(str(caught.value)) < 300


def bomb(first, repeated):
    """A kilobyte that stands for 10^9 values."""
    rows = [f"a0: &a0 {first}"]
    return "\n".join(rows + [f"a{i}: &a{i} {repeated(f'*a{i - 1}')}" for i in range(1, 9)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("[x,x,x,x,x,x,x,x,x,x]", lambda a: f"[{','.join([a] * 10)}]"), "at most 20,000"),
        (bomb("{x: 1}", lambda a: f"{{p: {a}, q: {a}, r: {a}, s: {a}}}"), "at most 20,000"),
        (bomb("{x: 1}", lambda a: f"{{<<: [{','.join([a] * 10)}]}}"), "unknown setting"),
    ],
    ids=["lists", "maps", "merges"],
)
def test_aliases_cannot_grow(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\nmodel: *a8\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value)) < 2000


def test_aliases_and_merges_are_copies(tmp_path):
    """An override of one of two settings that share an anchor changes that one."""
    text = "model: {path: m}\ndata: {train: &rows {path: a, limit: 3}, test: *rows}\n"
    text += "baselines: [&one {name: a, policy: even}, {<<: *one, name: b}]\n"
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + text, encoding="utf-8")  # a byte order mark is no text
    config = load_config(path, ["data.test.path=b"])
    assert (config.data.train.path, config.data.test.path) == ("a", "b")
    assert config.data.test.limit == 3
    assert [(b.name, b.policy) for b in config.baselines] == [("a", "even"), ("b", "even")]


def test_a_message_is_small_whatever_came():
    nested = ["x"]
    for _ in range(60):
        nested = [nested] * 2
    wrong = {"model": nested, "data": {"train": nested}, "name": "x" * 10**7, "seeds": [[]] * 10**5}
    wrong |= {"baselines": [nested, 10**5000, {"name": "a" * 10**6}] * 50, "k" * 10**6: 1}
    with pytest.raises(ValueError, match=r"more$") as caught:
        parse_config(wrong)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("seed", [-1, 2**32, 10**400], ids=["negative", "2^32", "400 digits"])
def test_numbers_no_generator_takes_are_refused(seed):
    with pytest.raises(ValueError, match=r"train\.seed: .*got"):
        parse_config(change(train={"seed": seed}))
    with pytest.raises(ValueError, match=r"warmup\.max_steps: .*got a whole number of 1329 bits"):
        parse_config(change(warmup={"max_steps": 10**400}))


SECRET = "S3CRET"
URL = f"postgresql://u:{SECRET}@h/db"
LEAKS = {  # where a password can come into a message
    "beside a wrong range": {"search": {"rank": [8, 2, 2], "storage": URL}},
    "a list": {"search": {"storage": [URL]}},
    "a map": {"search": {"storage": {"url": URL}}},
    "for the section": {"search": URL},
    "for the sections": {"search": [URL], "train": {"a": URL}},
    "an @ in it": {"search": f"postgresql://u:x@{SECRET}@h/db"},
    "a space in it": {"search": f"postgresql://u:x {SECRET}@h/db"},
    "another setting": {"name": URL, "select": {"policy": URL}},
    "as a key": {URL: 1, "search": {URL: 1}},
    "a far @": {"name": f"postgresql://u:{'x' * 5000}{SECRET}@h/db"},
    "two sources": {
        "data": {"train": {"path": f"https://u:{SECRET}@h/x", "hub": f"hf_{SECRET}{'a1' * 14}"}}
    },
    "a token": {"select": {"policy": f"https://h/x?access_token={SECRET}"}},
}


@pytest.mark.parametrize("case", LEAKS)
def test_no_message_shows_a_password(case, tmp_path):
    with pytest.raises(ValueError, match="problem") as caught:
        parse_config(MINIMAL | LEAKS[case])
    text = "".join(traceback.format_exception(caught.value))  # what a notebook would show
    assert SECRET not in text


def test_broken_yaml_and_overrides_show_no_password(tmp_path):
    path = tmp_path / "run.yaml"
    for text in (f"search: {{storage: {URL}: x}}", f"a: b: {URL}", f"a: !{SECRET} x", f"a: '{URL}"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(FileError) as caught:
            load_config(path)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    path = write(tmp_path, MINIMAL)
    for override in (f"search.storage:{URL}", f"search.storage=[{URL}", f"name.x.{URL}=1"):
        with pytest.raises(ValueError, match="override") as caught:
            load_config(path, [override, "name=x", override])
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_written_password_is_masked_and_not_read_back(tmp_path):
    config = parse_config(change(search={"storage": URL}, model={"path": f"https://u:{SECRET}@h"}))
    assert SECRET not in repr(config.search)
    text = dump_config(config)
    assert SECRET not in text
    assert "postgresql://u:***@h/db" in text
    with pytest.raises(ValueError, match=r"got one that was masked.*\$\{NAME\}"):
        storage_url(load_config(write(tmp_path, text)).search)


def test_the_storage_is_read_from_the_environment_when_it_is_used(monkeypatch):
    for name in ("FLOE_DB", "FLOE_PW"):
        monkeypatch.delenv(name, raising=False)
    part = SearchConfig(storage="postgresql://u:${FLOE_PW}@h/db")
    assert "${FLOE_PW}" in dump_config(parse_config(change(search={"storage": part.storage})))
    with pytest.raises(ValueError, match=r"search\.storage needs the .* FLOE_PW"):
        storage_url(part)
    monkeypatch.setenv("FLOE_PW", "a@b/c d")
    monkeypatch.setenv("FLOE_DB", URL)
    assert storage_url(part) == "postgresql://u:a%40b%2Fc%20d@h/db"
    assert storage_url(SearchConfig(storage="${FLOE_DB}")) == URL
    assert storage_url(SearchConfig(storage=URL)) == URL
    assert storage_url(SearchConfig()) is None


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("see https://u:p@h/x and a@b", "see https://u:***@h/x and a@b"),
        ("https://u:a@b:c@h", "https://u:***@h"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("https://0123456789abcdef@h/x", "https://***@h/x"),
        ("https://h/x?a=1&api_key=zz&b=2", "https://h/x?a=1&api_key=***&b=2"),
        ("host=h password=zz dbname=d", "host=h password=*** dbname=d"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        (f"token hf_{'aB3' * 12} refused", "token *** refused"),
        ("/data/hf_models_of_mine/sk-learn", "/data/hf_models_of_mine/sk-learn"),
        ("postgresql://u:${PW}@h/db", "postgresql://u:${PW}@h/db"),
        ("C:\\x 12:30 a:b@c", "C:\\x 12:30 a:b@c"),
    ],
)
def test_what_is_hidden_and_what_is_not(text, hidden):
    assert hide_secrets(text) == hidden
    assert str(FileError("f", text)) == f"f: {hidden}"


def test_hiding_takes_linear_time():
    began = time.perf_counter()
    for piece in ("://", "a://:", "@", "?token", "pass", "password=", "bearer "):
        hide_secrets(f"?{piece * 50_000}")
    assert time.perf_counter() - began < 5
