import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import floe
from floe.errors import FileError
from floe.importance.scores import Scores
from floe.selection.masks.determine import BUDGET_PATH, PRESETS, Preset, determine, path_score
from floe.selection.ranking import layer_score, rank_layers, spearman
from floe.selection.select import Selection, select

LAYERS = 6


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return Scores(
        head_fisher=rng.lognormal(0, 1, (LAYERS, 4)),
        neuron_fisher=rng.lognormal(-2, 1, (LAYERS, 40)),
        head_taylor=rng.lognormal(1, 1, (LAYERS, 4)),
        neuron_taylor=rng.lognormal(0, 1, (LAYERS, 40)),
        adapter_fisher=np.array([1.0, 6, 3, 5, 2, 4]),
        meta={
            "adapter_parameters": [10, 20, 30, 40, 50, 60],
        },
        head_gradient=rng.normal(size=(5, LAYERS, 4)).astype(np.float32),
        neuron_gradient=rng.normal(size=(5, LAYERS, 40)).astype(np.float32),
    )


def test_default_policy_is_adapter_sensitivity(scores):
    found = select(scores, layers=2)
    assert found.policy == "adapter_fisher"
    assert found.layers == (1, 3)
    assert found.ranking == (1, 3, 5, 2, 4, 0)
    assert found.layer_scores.tolist() == scores.adapter_fisher.tolist()
    assert (found.preset, found.budget, found.seed, found.tuned) == ("global", 0.5, 41, False)
    assert found.tuning == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_papers_choice_is_always_there(scores, preset):
    found = select(scores, preset=preset, layers=3, policy="first")
    masks = determine(scores, preset)
    expected = layer_score(masks.head_mask, masks.neuron_mask)
    paper = found.paper
    assert paper.layer_scores.tolist() == expected.tolist()
    assert paper.ranking == tuple(rank_layers(expected).tolist())
    assert paper.layers == tuple(sorted(paper.ranking[:3]))
    assert paper.preset == preset
    assert paper.masked_head_fraction == pytest.approx((~masks.head_mask).mean(axis=1))
    assert paper.masked_neuron_fraction == pytest.approx((~masks.neuron_mask).mean(axis=1))
    assert found.masks.head_mask.dtype == np.float64
    assert np.array_equal(found.masks.neuron_mask, masks.neuron_mask)
    assert found.certificate == masks.certificate
    assert found.layers == (0, 1, 2)
    assert found.agreement == {
        "spearman": spearman(np.arange(LAYERS, 0, -1), expected),
        "overlap": len({0, 1, 2} & set(paper.layers)),
        "expected_overlap": 1.5,
    }


def test_masks_policy_is_the_papers_choice(scores):
    found = select(scores, policy="masks", layers=0.5, score="sparsity")
    assert found.layers == found.paper.layers
    assert found.layer_scores.tolist() == found.paper.layer_scores.tolist()
    assert found.agreement == {"spearman": pytest.approx(1), "overlap": 3, "expected_overlap": 1.5}
    assert found.score == "sparsity"


def test_all_chooses_all(scores):
    found = select(scores, policy="all", layers=2)
    assert found.layers == tuple(range(LAYERS))
    assert len(found.paper.layers) == 2
    assert found.agreement["spearman"] is None


def test_layers_by_parameter_budget(scores):
    assert select(scores, layers={"params": 60}).layers == (1, 3)
    assert select(scores, layers={"params": 59}).layers == (1,)
    # Even layers depend on their number: of two (0 and 5) 70 parameters, of three (0, 3, 5) 110.
    assert select(scores, policy="even", layers={"params": 70}).layers == (0, 5)
    assert select(scores, policy="even", layers={"params": 110}).layers == (0, 3, 5)
    with pytest.raises(ValueError, match="must fit at least one layer, got 5"):
        select(scores, layers={"params": 5})
    bare = dataclasses.replace(scores, meta={})
    with pytest.raises(ValueError, match="needs the adapter parameters of each layer"):
        select(bare, layers={"params": 60})


def test_layers_by_memory_budget(scores):
    memory = [700, 600, 500, 400, 300, 200]
    assert select(scores, layers={"memory": 1000}, layer_memory=memory).layers == (1, 3)
    assert select(scores, layers={"memory": 999}, layer_memory=memory).layers == (1,)
    given = select(scores, layers={"memory": 5}, layer_memory=[1, 2, 3, 4, 5, 6])
    assert given.layers == (1,)
    with pytest.raises(ValueError, match=r"must fit at least one layer, got 5; layer . takes"):
        select(scores, layers={"memory": 5}, layer_memory=memory)
    with pytest.raises(ValueError, match="needs the bytes of training memory of each layer"):
        select(scores, layers={"memory": 5})


def test_the_bottom_of_any_ranking(scores):
    found = select(scores, layers=2, pick="bottom")
    assert (found.layers, found.ranking, found.pick) == ((0, 4), (0, 4, 2, 5, 3, 1), "bottom")
    assert found.layer_scores.tolist() == scores.adapter_fisher.tolist()
    assert found.paper.layers == select(scores, layers=2).paper.layers
    top = select(scores, layers=4, policy="masks")
    rest = select(scores, layers=2, policy="masks", pick="bottom")
    assert set(top.layers) | set(rest.layers) == set(range(LAYERS))
    assert select(scores, policy="first", layers=2, pick="bottom").layers == (4, 5)
    assert select(scores, layers={"params": 60}, pick="bottom").layers == (0, 4)
    assert select(scores, layers=2, policy="all", pick="bottom").layers == tuple(range(LAYERS))
    with pytest.raises(ValueError, match=r"pick must be one of .* got 'left'"):
        select(scores, layers=2, pick="left")


def test_equal_scores_go_to_the_lower_index_from_either_end(scores):
    tied = dataclasses.replace(scores, adapter_fisher=np.array([2.0, 1, 2, 1, 2, 1]))
    assert select(tied, layers=2).layers == (0, 2)
    assert select(tied, layers=2, pick="bottom").layers == (1, 3)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_score_over_a_path_of_budgets(scores, preset, tmp_path):
    found = select(scores, preset=preset, policy="masks", score="path", layers=2)
    expected = path_score(scores, preset)
    assert found.layer_scores.tolist() == expected.tolist()
    assert found.paper.layer_scores.tolist() == expected.tolist()
    assert found.budget_path == BUDGET_PATH
    other = select(scores, preset=preset, policy="masks", score="path", layers=2, budget=0.9)
    assert other.ranking == found.ranking  # the single budget decides the masks alone
    short = select(scores, preset=preset, score="path", layers=2, budget_path=[0.8, 0.2])
    assert short.budget_path == (0.2, 0.8)
    short.save(tmp_path)
    assert Selection.load(tmp_path).budget_path == (0.2, 0.8)
    assert select(scores, preset=preset, layers=2).budget_path == ()


def test_random_follows_the_seed(scores):
    chosen = {select(scores, policy="random", layers=3, seed=s).layers for s in range(20)}
    assert len(chosen) > 5
    again = [select(scores, policy="random", layers=3, seed=7).ranking for _ in range(2)]
    assert again[0] == again[1]


def test_unknown_names(scores):
    with pytest.raises(ValueError, match=r"policy must be one of .*'adapter_fisher'.* got 'best'"):
        select(scores, policy="best")
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'paper'"):
        select(scores, layers=2, preset="paper")
    with pytest.raises(ValueError, match=r"score must be one of .* got 'hard'"):
        select(scores, layers=2, score="hard")
    with pytest.raises(ValueError, match=r"layers must be in \[1, 6\], got 8"):
        select(scores)
    with pytest.raises(ValueError, match="budget must be a fraction"):
        select(scores, layers=2, budget=2.0)
    with pytest.raises(ValueError, match=r"needs scores\.probe_fisher"):
        select(scores, layers=2, policy="probe")


def test_model_and_batches_come_together(scores):
    with pytest.raises(ValueError, match="given together, got no batches"):
        select(scores, model=object(), layers=2)
    with pytest.raises(ValueError, match="given together, got no model"):
        select(scores, batches=[], layers=2)
    assert not select(scores, model=object(), layers=2, tune=False).tuned


@pytest.mark.parametrize(
    "name", ["head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor", "adapter_fisher"]
)
def test_degenerate_scores_are_reported(scores, name):
    zero = dataclasses.replace(scores, **{name: np.zeros_like(getattr(scores, name))})
    with pytest.warns(RuntimeWarning, match=f"scores.{name} is zero everywhere"):
        found = select(zero, layers=2)
    assert len(found.layers) == 2


def test_degenerate_scores_of_another_policy_are_not(scores):
    zero = dataclasses.replace(scores, adapter_fisher=np.zeros(LAYERS))
    assert select(zero, layers=2, policy="masks").layers  # a warning would be an error here


def test_selection_survives_its_file(scores, tmp_path):
    found = select(scores, layers=2, preset="paper_layer")
    found.save(tmp_path)
    read = Selection.load(tmp_path / "selection.json")
    for field in dataclasses.fields(Selection):
        if field.name not in ("layer_scores", "masks", "paper"):
            assert getattr(read, field.name) == getattr(found, field.name), field.name
    assert read.layer_scores.tolist() == found.layer_scores.tolist()
    for one, other in zip(read.masks, found.masks, strict=True):
        assert np.array_equal(one, other)
    for field in dataclasses.fields(found.paper):
        one, other = getattr(read.paper, field.name), getattr(found.paper, field.name)
        assert np.array_equal(one, other), field.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks.npz", "selection.json"]


def test_equal_selections_give_equal_bytes(scores, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        select(scores, layers=2).save(tmp_path / name)
    for file in ("selection.json", "masks.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    document = json.loads((tmp_path / "one" / "selection.json").read_text())
    assert list(document) == sorted(document)
    assert set(document) >= {"policy", "preset", "budget", "layers", "layer_scores", "ranking"}
    assert set(document) >= {"tuned", "tuning", "paper", "agreement", "certificate", "seed"}


def test_two_selections_in_one_folder(scores, tmp_path):
    select(scores, layers=2).save(tmp_path / "a.json")
    select(scores, layers=2, preset="exact").save(tmp_path / "b.json")
    assert Selection.load(tmp_path / "a.json").preset == "global"
    assert Selection.load(tmp_path / "b.json").preset == "exact"


def change(path, **values):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "selection.json: is missing"),
        (lambda p: p.write_text(p.read_text()[:100]), "cannot be read as JSON"),
        (lambda p: p.write_text("[]"), "must hold a JSON object, got list"),
        (lambda p: change(p, format=1), "format must be 3, got 1; select again"),
        (lambda p: change(p, pick="left"), "pick must be one of .* got 'left'"),
        (lambda p: change(p, budget_path=["x"]), "budget_path must be a list of numbers, got 'x'"),
        (lambda p: change(p, extra=1), "extra is no key that is known"),
        (lambda p: change(p, paper={}), "paper.preset is missing; it must be a string"),
        (lambda p: change(p, layers=[1, 6]), r"layers must be ascending layer indices in \[0, 6\)"),
        (lambda p: change(p, layers=[3, 1]), r"layers must be ascending layer indices in \[0, 6\)"),
        (
            lambda p: change(p, ranking=[0] * 6),
            "ranking must be a permutation of the layer",
        ),
        (
            lambda p: change(p, layer_scores=[1.0]),
            "layer_scores must be a list of 6 finite",
        ),
        (lambda p: p.with_name("masks.npz").unlink(), "masks.npz: is missing"),
        (lambda p: p.with_name("masks.npz").write_bytes(b"x"), "not the masks that selection.json"),
    ],
)
def test_damaged_files_are_refused(scores, tmp_path, damage, message):
    select(scores, layers=2).save(tmp_path)
    damage(tmp_path / "selection.json")
    with pytest.raises(FileError, match=message):
        Selection.load(tmp_path)


def test_nothing_is_left_where_saving_fails(scores, tmp_path):
    with pytest.raises(FileError, match="cannot be written"):
        select(scores, layers=2).save(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_selection_works_without_torch():
    """As on a laptop that has only numpy: neither torch nor transformers is imported."""
    code = (
        "import sys, numpy as np\n"
        "import floe.selection.select, floe\n"
        "from floe.importance.scores import Scores\n"
        "one = np.ones((3, 2))\n"
        "scores = Scores(one, one, one, one, np.arange(3.0))\n"
        "assert floe.select(scores, layers=1).layers == (2,)\n"
        "loaded = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_presets_are_open(scores):
    mine = Preset("mine", cost="unit", granularity="layer", refine="swap", pairs="all")
    assert select(scores, layers=2, preset=mine).preset == "mine"
    assert floe.select is select


def test_tuning_changes_retained_units_alone(tmp_path):
    """The tuning stage on a tiny random model: real-valued masks, scored and recorded."""
    torch = pytest.importorskip("torch")
    from helpers.importance_models import plain

    rng = np.random.default_rng(1)
    scores = Scores(
        head_fisher=rng.lognormal(0, 1, (3, 4)),
        neuron_fisher=rng.lognormal(0, 1, (3, 40)),
        head_taylor=rng.lognormal(0, 1, (3, 4)),
        neuron_taylor=rng.lognormal(0, 1, (3, 40)),
        adapter_fisher=np.ones(3),
    )
    ids = torch.randint(3, 61, (6, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch["position_ids"] = torch.arange(12).repeat(6, 1)
    binary = select(scores, layers=1)
    seen = []
    tuned = select(
        scores, plain(), [batch], layers=1, tune_tokens=64, progress=lambda *step: seen.append(step)
    )
    assert tuned.tuned
    assert seen[-1] == (3, 3, "tune")
    assert {(r["layer"], r["component"]) for r in tuned.tuning} >= {(0, "attention"), (2, "ffn")}
    for real, flag in zip(tuned.masks, binary.masks, strict=True):
        assert ((real == 0) == (flag == 0)).all()
        assert (real[flag == 1] != 1).any()
    expected = layer_score(*tuned.masks)
    assert tuned.paper.layer_scores.tolist() == expected.tolist()
    assert tuned.paper.layer_scores.tolist() != binary.paper.layer_scores.tolist()
    tuned.save(tmp_path)
    assert Selection.load(tmp_path).tuning == tuned.tuning


def untunable(kind):
    """A model whose masks cannot be tuned, and what says so."""
    hf = pytest.importorskip("transformers")
    from helpers.importance_models import SIZES, Codes, plain

    from floe.decoder_blocks import find_blocks

    if kind == "codes":
        model = plain()
        for block in find_blocks(model):
            block.module.mlp.up_proj = Codes(block.module.mlp.up_proj)
        return model, "must have floating-point weights to tune masks"
    if kind == "offloaded":
        model = plain()
        find_blocks(model)[2].module.mlp.down_proj.to("meta")
        return model, "must be in memory to tune masks, got model.layers.2.mlp.down_proj"
    if kind == "granite":
        config = hf.GraniteConfig(**SIZES, residual_multiplier=0.22)
        return hf.GraniteForCausalLM(config), "block model.layers.0 must output its input plus"
    config = hf.Glm4Config(**SIZES, head_dim=8)
    return hf.Glm4ForCausalLM(config), "block model.layers.0 must output its input plus"


@pytest.mark.parametrize("policy", ["adapter_fisher", "masks", "random"])
@pytest.mark.parametrize("kind", ["codes", "offloaded", "granite", "glm4"])
def test_layers_are_chosen_where_masks_cannot_be_tuned(kind, policy, tmp_path):
    torch = pytest.importorskip("torch")
    model, reason = untunable(kind)
    rng = np.random.default_rng(1)
    units = {"head": (3, 4), "neuron": (3, 40)}
    parts = {
        f"{u}_{k}": rng.lognormal(0, 1, s) for u, s in units.items() for k in ("fisher", "taylor")
    }
    scores = Scores(**parts, adapter_fisher=np.arange(3.0))
    ids = torch.randint(3, 61, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    binary = select(scores, policy=policy, layers=1)
    assert binary.untuned == "no model and batches were given"
    with pytest.warns(RuntimeWarning, match="the masks are not tuned, binary ones are scored: "):
        found = select(scores, model, [batch], policy=policy, layers=1)
    assert (found.layers, found.tuned, found.tuning) == (binary.layers, False, [])
    assert found.layer_scores.tolist() == binary.layer_scores.tolist()
    assert reason in found.untuned
    found.save(tmp_path)
    assert Selection.load(tmp_path).untuned == found.untuned
    with pytest.raises(ValueError, match=r"tune=True \(select\.tune: true\) asks for masks that"):
        select(scores, model, [batch], policy=policy, layers=1, tune=True)
    assert select(scores, model, [batch], layers=1, tune=False).untuned == "tune is False"


def test_tuning_that_must_run_needs_a_model(scores):
    with pytest.raises(ValueError, match="model and batches must be given for tune=True, got none"):
        select(scores, layers=2, tune=True)


def test_a_selection_of_the_format_before_is_read(scores, tmp_path):
    select(scores, layers=2).save(tmp_path)
    file = tmp_path / "selection.json"
    document = json.loads(file.read_text())
    del document["untuned"]
    file.write_text(json.dumps(document | {"format": 2}))
    found = Selection.load(tmp_path)
    assert (found.tuned, found.untuned) == (False, "")
