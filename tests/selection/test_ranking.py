import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.selection.ranking import (
    choose_layers,
    count_layers,
    expected_overlap,
    layer_score,
    overlap,
    rank_layers,
    spearman,
)

HEADS = [[0, 1.2, 0.8, 0]]
NEURONS = [[0, 0, 0, 1.1, 0.9, 1.3, 0.2, 0]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("soft", 0.58125),
        ("sparsity", 0.5),
    ],
)
def test_layer_score(how, expected):
    found = layer_score(HEADS, NEURONS, how)
    assert found.dtype == np.float64
    assert found == pytest.approx([expected], abs=1e-15)


def test_layer_score_averages_components():
    heads, neurons = [[0, 0], [1, 1]], [[1] * 6, [0] * 3 + [1] * 3]
    assert layer_score(heads, neurons, "sparsity").tolist() == [0.5, 0.25]
    assert layer_score(np.array(heads, dtype=bool), neurons).tolist() == [0.5, 0.25]
    assert layer_score(np.ones((2, 0)), neurons).tolist() == [0, 0.5]


def test_layer_score_errors():
    with pytest.raises(ValueError, match=r"score must be one of .* got 'hard'"):
        layer_score(HEADS, NEURONS, "hard")
    with pytest.raises(ValueError, match=r"head_mask\[0, 1\] must be finite, got nan"):
        layer_score([[1, np.nan]], NEURONS)
    with pytest.raises(ValueError, match="one row per layer, got 1 and 2"):
        layer_score(HEADS, NEURONS * 2)
    with pytest.raises(ValueError, match=r"head_mask must be \[L, units\], got shape \(4,\)"):
        layer_score(HEADS[0], NEURONS)
    with pytest.raises(ValueError, match="at least one head or neuron"):
        layer_score(np.ones((2, 0)), np.ones((2, 0)))


def test_rank_layers_breaks_ties_by_index():
    assert rank_layers([1, 3, 2, 3]).tolist() == [1, 3, 2, 0]
    many = np.arange(300) % 3
    expected = sorted(range(300), key=lambda i: (-many[i], i))
    assert rank_layers(many).tolist() == expected
    assert rank_layers([0.0, -0.0, 0.0]).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"scores\[2\] must be a number, got nan"):
        rank_layers([1, 2, np.nan])
    with pytest.raises(ValueError, match="scores must be one-dimensional"):
        rank_layers([[1, 2]])


@pytest.mark.parametrize(
    ("layers", "total", "count"),
    [
        *[(1, 30, 1), (1.0, 30, 30), (8, 30, 8), (0.25, 30, 8), (0.25, 32, 8), (0.1, 30, 3)],
        *[(0.07, 100, 7), (0.01, 30, 1), (1e-12, 30, 1), (30, 30, 30), (np.int64(3), 5, 3)],
    ],
)
def test_count_layers(layers, total, count):
    assert count_layers(layers, total) == count


def test_count_layers_errors():
    for bad in (0, -1, 31):
        with pytest.raises(ValueError, match=r"layers must be in \[1, 30\], got"):
            count_layers(bad, 30)
    for bad in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"layers as a fraction must be in \(0, 1\], got"):
            count_layers(bad, 30)
    for bad in ("8", True, None):
        with pytest.raises(TypeError, match="layers must be an int or a float, got"):
            count_layers(bad, 30)


def test_choose_layers():
    ranking = [3, 1, 0, 2]
    assert choose_layers(ranking, 2) == (1, 3)
    assert choose_layers(ranking, 0.5) == (1, 3)
    assert choose_layers(np.array(ranking), 1.0) == (0, 1, 2, 3)
    costs = [10, 20, 5, 40]
    assert choose_layers(ranking, {"params": 40}, costs) == (3,)
    assert choose_layers(ranking, {"params": 59}, costs) == (3,)  # layer 2 is not skipped to
    assert choose_layers(ranking, {"params": 60}, costs) == (1, 3)
    assert choose_layers(ranking, {"params": 10**9}, costs) == (0, 1, 2, 3)
    assert choose_layers(ranking, {"memory": 60}, costs) == (1, 3)


def test_choose_layers_errors():
    with pytest.raises(ValueError, match=r"must fit at least one layer, got 39; layer 1 takes 40"):
        choose_layers([1, 0], {"params": 39}, [1, 40])
    with pytest.raises(ValueError, match="needs the adapter parameters of each layer"):
        choose_layers([1, 0], {"params": 39})
    with pytest.raises(ValueError, match="parameters must be 2 numbers >= 0"):
        choose_layers([1, 0], {"params": 39}, [1])
    with pytest.raises(ValueError, match=r"one key of \['memory', 'params'\], got \['budget'\]"):
        choose_layers([1, 0], {"budget": 39}, [1, 1])
    with pytest.raises(ValueError, match=r"layers\['params'\] must be >= 1, got 0"):
        choose_layers([1, 0], {"params": 0}, [1, 1])
    with pytest.raises(ValueError, match=r"one key of .* got \['memory', 'params'\]"):
        choose_layers([1, 0], {"params": 1, "memory": 1}, [1, 1])
    with pytest.raises(ValueError, match="needs the bytes of training memory of each layer"):
        choose_layers([1, 0], {"memory": 39})
    with pytest.raises(TypeError, match=r"layers\['params'\] must be an integer, got float"):
        choose_layers([1, 0], {"params": 1.5}, [1, 1])
    for bad in ([0, 0], [1, 2], []):
        with pytest.raises(ValueError, match="ranking must"):
            choose_layers(bad, 1)


def test_spearman():
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833, abs=1e-7)
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 3], [10, 20, 1e9]) == 1
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([], []) is None
    with pytest.raises(ValueError, match=r"second\[0\] must be a number, got nan"):
        spearman([1, 2], [np.nan, 1])
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        spearman([1, 2], [1, 2, 3])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
@settings(deadline=None)
def test_spearman_is_pearson_of_mean_ranks(pairs):
    def ranks(values):
        return [sum(v < w for v in values) + (values.count(w) + 1) / 2 for w in values]

    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    found = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1], abs=1e-12)
        assert spearman(b, a) == found


def test_overlap():
    assert overlap((1, 2, 3), (3, 4, 1)) == 2
    assert expected_overlap(8, 8, 30) == pytest.approx(64 / 30)
    with pytest.raises(ValueError, match="sizes must be"):
        expected_overlap(9, 1, 8)
