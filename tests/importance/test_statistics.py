import subprocess
import sys

import numpy as np
import pytest

from floe.errors import FileError
from floe.importance.scores import FORMAT, LayerStatistics
from floe.selection.policies.registry import known_statistics


def values(layers=3, **changes):
    rng = np.random.default_rng(0)
    sizes = {"L": layers, "L + 1": layers + 1, "P": 2}
    known = known_statistics().items()
    found = {name: rng.random([sizes[size] for size in one.sizes]) for name, one in known}
    return found | changes


def test_save_and_load_keep_every_bit(tmp_path):
    for measured in (values(), {"shapley": np.array([-1.0, 0.0, 2.0])}, {}):
        statistics = LayerStatistics(3, measured, {"rows": 7})
        statistics.save(tmp_path / "s.npz")
        loaded = LayerStatistics.load(tmp_path / "s.npz")
        assert (loaded.layers, loaded.meta) == (3, {"rows": 7})
        assert loaded.values.keys() == measured.keys()
        for name, array in measured.items():
            assert loaded.values[name].dtype == np.float64
            assert np.array_equal(loaded.values[name], array)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_equal_content_gives_equal_bytes(tmp_path, monkeypatch):
    measured = values()
    LayerStatistics(3, measured).save(tmp_path / "a.npz")
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    backwards = dict(reversed(measured.items()))
    LayerStatistics(3, backwards).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def changed(name, place, value):
    array = values()[name]
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"what": np.ones(3)}, ValueError, "must be one of .*got 'what'"),
        ({"shapley": [1.0]}, TypeError, "shapley must be a numpy array of float64, got list"),
        ({"shapley": np.ones(3, "f4")}, TypeError, "got numpy float32"),
        ({"shapley": np.ones(2)}, ValueError, r"shapley must be \[L\] with L = 3, got shape \(2,"),
        ({"coupling": np.ones((3, 2))}, ValueError, r"coupling must be \[L, L\]"),
        ({"signal_share": np.ones(3)}, ValueError, r"signal_share must be \[L, P\]"),
        ({"signal_share": np.ones((3, 0))}, ValueError, r"signal_share must be \[L, P\]"),
        ({"angular_all": np.ones((3, 3))}, ValueError, r"must be \[L \+ 1, L \+ 1\]"),
        (changed("shapley", 1, np.nan), ValueError, "shapley must be finite, got nan in layer 1"),
        (changed("kl_to_full", 2, -1), ValueError, "finite and >= 0, got -1.0 in layer 2"),
        (changed("residual_norm", 0, np.inf), ValueError, "got inf in layer 0"),
        (changed("coupling", (1, 0), 1.5), ValueError, r"in \[0, 1\], got 1.5 in layer 1"),
    ],
)
def test_what_is_refused(bad, error, message):
    with pytest.raises(error, match=message):
        LayerStatistics(3, bad)


def test_layers_and_meta_are_checked():
    with pytest.raises(TypeError, match="layers must be an int, got bool"):
        LayerStatistics(True, {})
    with pytest.raises(ValueError, match="layers must be >= 1, got 0"):
        LayerStatistics(0, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        LayerStatistics(1, {}, {"path": object()})


def test_values_cannot_be_added_later():
    measured = {"shapley": np.zeros(3)}
    statistics = LayerStatistics(3, measured)
    measured["lamp_kept"] = np.full(3, 7.0)
    assert set(statistics.values) == {"shapley"}
    with pytest.raises(TypeError, match="does not support item assignment"):
        statistics.values["shapley"] = np.ones(3)


def test_bad_files(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(FileError, match="no such file"):
        LayerStatistics.load(path)
    LayerStatistics(3, values()).save(path)
    whole = path.read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(FileError, match="not a readable statistics file"):
            LayerStatistics.load(path)
    np.save(tmp_path / "plain.npy", np.ones(3))
    with pytest.raises(FileError, match="not a readable statistics file"):
        LayerStatistics.load(tmp_path / "plain.npy")
    with pytest.raises(FileError, match="cannot write the statistics"):
        LayerStatistics(3, {}).save(tmp_path / "missing" / "s.npz")


def test_headers_of_other_files(tmp_path):
    def written(text, **arrays):
        np.savez(tmp_path / "s.npz", meta=np.frombuffer(text.encode(), np.uint8), **arrays)
        return tmp_path / "s.npz"

    good = f'{{"format": {FORMAT}, "layers": 2, "meta": {{}}}}'
    assert LayerStatistics.load(written(good)).layers == 2
    for text, message in (
        (good.replace(str(FORMAT), "99", 1), "format must be 1, got 99; measure the model again"),
        ("{", "its entry 'meta' is not that of a statistics file"),
        ("{}", "its entry 'meta' is not that of a statistics file"),
    ):
        with pytest.raises(FileError, match=message):
            LayerStatistics.load(written(text))
    with pytest.raises(FileError, match="a statistic must be one of"):
        LayerStatistics.load(written(good, what=np.ones(2)))
    np.savez(tmp_path / "s.npz", shapley=np.ones(2))
    with pytest.raises(FileError, match="must hold the entry 'meta'"):
        LayerStatistics.load(tmp_path / "s.npz")


def test_reading_needs_no_torch(tmp_path):
    LayerStatistics(3, values()).save(tmp_path / "s.npz")
    code = (
        "import sys; from floe.importance.scores import LayerStatistics as L; "
        "L.load(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.npz")], check=True)
