import pytest

from floe.selection.masks.determine import PRESETS, Preset, preset_of


def test_presets_check_their_options():
    assert preset_of("exact") is PRESETS["exact"]
    assert preset_of(PRESETS["exact"]) is PRESETS["exact"]
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'best'"):
        preset_of("best")
    with pytest.raises(ValueError, match=r"cost must be one of .* got 'free'"):
        Preset("x", cost="free")
    with pytest.raises(ValueError, match="needs one cost per class"):
        Preset("x", objective="alg1_literal", cost="unit")
    for objective, stage in (("retain", "alg2_literal"), ("alg1_literal", "swap")):
        with pytest.raises(ValueError, match="spends another budget"):
            Preset("x", objective=objective, refine=stage)


def test_presets_are_named_as_they_are_found():
    assert {name: preset.name for name, preset in PRESETS.items()} == {n: n for n in PRESETS}
    assert set(PRESETS) == {"global", "exact", "paper_layer", "alg1_literal"}
