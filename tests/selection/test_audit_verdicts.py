"""What an audit says about routers, numbers of layers and agreement, from its numbers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.audit_cases import light, make, run

from floe.artifacts.audit import Audit
from floe.artifacts.results import Router, Training
from floe.artifacts.schema import document, write
from floe.pipeline.audit import arm_losses
from floe.selection.audit import judge
from floe.storage import read_json, write_json


@pytest.fixture(scope="module")
def found():
    return run(make())


def router(usage, load=0.9, information=0.1, layer=0):
    return Router(layer, "up_proj", tuple(usage), load, load - information, information)


@pytest.mark.parametrize("usage", [[1.0], [0.5, 0.5], [0.95, 0.05], [0.9, 0.1]])
@pytest.mark.parametrize("load", [0.49, 0.5])
@pytest.mark.parametrize("information", [0.0099, 0.01])
def test_the_flags_of_routers_are_in_the_file(found, usage, load, information, tmp_path):
    one = router(usage, load, information)
    replace(found, routers=(one,)).save(tmp_path / "audit.json")
    (written,) = read_json(tmp_path / "audit.json")["routers"]
    flags = {name: getattr(one, name) for name in ("collapsed", "unspecialised", "cv2")}
    assert written == document(one) | flags
    assert Audit.load(tmp_path / "audit.json", found.layers).routers == (one,)


def test_cv2_of_routers():
    even, uneven = router([0.5, 0.5]), router([0.75, 0.25])
    assert even.cv2 == 0
    assert uneven.cv2 == pytest.approx(0.25)  # variance 1/16 over squared mean 1/4


def test_routers_are_counted_for_each_adapter():
    bad = [router([0.95, 0.05]), router([0.5, 0.5], information=0)]
    found = run(light(), router=bad, trained_router=[router([0.5, 0.5])]).verdicts
    said = "Of the 2 routers of the scored adapter, 1 are collapsed and 1 unspecialised."
    assert said in found["open"]
    said = "Of the 1 routers of the trained adapter, 0 are collapsed and 0 unspecialised."
    assert said in found["solid"]
    assert not any("router" in text for texts in run(light()).verdicts.values() for text in texts)


def test_what_masking_costs_together_is_told_from_its_numbers(found):
    (text,) = [text for text in found.verdicts["note"] if "block Fisher" in text]
    assert f"Masking the {found.masks.masked} units" in text
    assert f"costs {found.masks.block_loss / found.masks.diagonal_loss:.2f} times" in text
    nothing = replace(found, masks=replace(found.masks, diagonal_loss=0.0, block_loss=0.0))
    assert not any("block Fisher" in text for text in judge(nothing)["note"])


def test_a_cliff_needs_several_numbers_of_layers(found):
    rng = np.random.default_rng(0)
    full = rng.random(40)
    assert any("one number of layers cannot show it" in text for text in found.verdicts["open"])
    assert run(light(), losses={2: full}).cliff is None
    noise = rng.normal(0, 0.01, 40)
    near = run(light(), losses={6: full, 2: full + noise - noise.mean()})
    assert near.cliff.begins is None
    assert any("No cliff seen down to 2" in text for text in near.verdicts["note"])
    far = run(light(), losses={6: full, 4: full + noise - noise.mean(), 2: full + 1 + noise})
    assert (far.cliff.begins, far.cliff.worse) == (2, (2,))
    assert any("With 2 layers or fewer" in text for text in far.verdicts["open"])


def test_readings_that_disagree_are_named(found):
    (text,) = [t for texts in found.verdicts.values() for t in texts if "4 readings" in t]
    names = [f"masks/{p}" for p in ("global", "exact", "paper_layer", "alg1_literal")]
    places = [found.agreement.names.index(name) for name in names]
    least = min(found.agreement.spearman[a][b] for a, b in itertools.combinations(places, 2))
    assert f"between {least:.2f}" in text
    assert ("disagree" in text) == (least < 0.9)
    assert (text in found.verdicts["open"]) == (least < 0.9)
    alike = [[1.0] * len(found.agreement.names)] * len(found.agreement.names)
    agreed = replace(found, agreement=replace(found.agreement, spearman=alike))
    assert any("masks agree" in text for text in judge(agreed)["solid"])


def test_the_number_of_policies_beyond_chance(found):
    place = found.agreement.names.index("adapter_fisher")
    beyond = sum(
        shared > found.null.overlap.high
        for name, shared in zip(found.agreement.names, found.agreement.overlap[place], strict=True)
        if name not in ("adapter_fisher", "random")
    )
    assert any(text.startswith(f"{beyond} of") for text in found.verdicts["note"])


def test_an_audit_never_claims_merit(found):
    texts = [text for texts in found.verdicts.values() for text in texts]
    assert not any(word in text for text in texts for word in ("better", "best rule", "superior"))
    assert "only training shows" in texts[-1]


def test_losses_by_row_weigh_rows_by_their_tokens(tmp_path):
    """Their mean over rows is the loss per token; arms of other policies are left out."""
    nll = {"main": [2.0, 6.0], "all": [1.0, 5.0], "random": [9.0, 9.0], "base": [8.0, 8.0]}
    arms = {"main": ("x", (0, 3)), "all": ("all", (0, 1, 2, 3)), "random": ("random", (1,))}
    assert arm_losses(tmp_path) is None
    (tmp_path / "eval").mkdir()
    write_json(tmp_path / "eval/losses.json", {"nll": nll, "tokens": [1, 3]})
    for arm, (policy, layers) in arms.items():
        (tmp_path / "train" / arm).mkdir(parents=True)
        facts = {"arm": arm, "policy": policy, "rank": 2, "num_experts": 2, "steps": 1}
        facts |= {"trainable_parameters": 1, "seconds": 1.0, "seconds_per_step": 1.0}
        write(tmp_path / f"train/{arm}/metrics.json", Training(layers=layers, **facts))
    found = arm_losses(tmp_path)
    assert {number: list(rows) for number, rows in found.items()} == {2: [1, 3], 4: [0.5, 2.5]}
    (tmp_path / "train/all/metrics.json").unlink()
    assert arm_losses(tmp_path) is None
