import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from floe.errors import FileError
from floe.importance.scores import Scores


def example(**changes):
    rng = np.random.default_rng(0)
    values = {
        "head_fisher": rng.random((3, 4)),
        "neuron_fisher": rng.random((3, 5)),
        "head_taylor": rng.random((3, 4)),
        "neuron_taylor": rng.random((3, 5)),
        "adapter_fisher": rng.random(3),
        "meta": {"model": "m", "rows": 7},
    }
    return Scores(**(values | changes))


def full():
    rng = np.random.default_rng(1)
    return example(
        probe_fisher=rng.random(3),
        head_gradient=rng.standard_normal((2, 3, 4)).astype(np.float32),
        neuron_gradient=rng.standard_normal((2, 3, 5)).astype(np.float32),
    )


@pytest.mark.parametrize("make", [example, full])
def test_save_and_load_keep_every_bit(make, tmp_path):
    scores = make()
    scores.save(tmp_path / "s.npz")
    loaded = Scores.load(tmp_path / "s.npz")
    assert loaded.meta == scores.meta
    for name, array in scores._arrays().items():
        assert getattr(loaded, name).dtype == array.dtype
        assert np.array_equal(getattr(loaded, name), array)
    assert loaded._arrays().keys() == scores._arrays().keys()
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_equal_content_gives_equal_bytes(tmp_path, monkeypatch):
    full().save(tmp_path / "a.npz")
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    full().save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_counts():
    assert example().layer_count == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_fisher": [[1.0]]}, TypeError, "head_fisher must be a numpy.*float64, got list"),
        ({"head_taylor": np.ones((3, 4), np.float32)}, TypeError, "head_taylor.*got numpy float32"),
        ({"head_gradient": np.ones((2, 3, 4))}, TypeError, "head_gradient.*got numpy float64"),
        ({"head_fisher": np.ones(3)}, ValueError, r"head_fisher must be \[L, H\]"),
        ({"head_taylor": np.ones((3, 5))}, ValueError, r"head_taylor must have .*got \(3, 5\)"),
        ({"neuron_taylor": np.ones((2, 5))}, ValueError, r"neuron_taylor must have shape \(3, 5\)"),
        ({"adapter_fisher": np.ones(2)}, ValueError, r"adapter_fisher must have shape \(3,\)"),
        ({"probe_fisher": np.ones(4)}, ValueError, r"probe_fisher must have shape \(3,\)"),
        ({"head_gradient": np.ones((2, 3, 9), "f4")}, ValueError, r"head_gradient must have"),
    ],
)
def test_wrong_shapes_and_types(changes, error, message):
    with pytest.raises(error, match=message):
        example(**changes)


def test_gradients_of_different_sample_counts():
    with pytest.raises(ValueError, match=r"neuron_gradient must have shape \(2, 3, 5\) as"):
        example(
            head_gradient=np.ones((2, 3, 4), np.float32),
            neuron_gradient=np.ones((3, 3, 5), np.float32),
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9])
def test_bad_values_name_field_layer_and_unit(bad):
    values = np.ones((3, 5))
    values[1, 4] = bad
    with pytest.raises(
        ValueError, match=r"neuron_fisher must be finite and >= 0, got .* at layer 1, neuron 4"
    ):
        example(neuron_fisher=values)
    values = np.ones(3)
    values[2] = bad
    with pytest.raises(
        ValueError, match=r"adapter_fisher must be finite and >= 0, got .* at layer 2"
    ):
        example(adapter_fisher=values)


def test_gradients_may_be_negative_but_not_nan():
    gradient = -np.ones((2, 3, 4), np.float32)
    example(head_gradient=gradient)
    gradient[1, 2, 3] = np.nan
    with pytest.raises(
        ValueError, match="head_gradient must be finite, got nan at sample 1, layer 2, head 3"
    ):
        example(head_gradient=gradient)


def test_missing_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(FileError, match="no such file"):
        Scores.load(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(FileError, match="not a readable scores file"):
        Scores.load(path)
    example().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FileError, match="not a readable scores file"):
        Scores.load(path)
    np.savez(path, head_fisher=np.ones((1, 1)))
    with pytest.raises(FileError, match="'meta'"):
        Scores.load(path)
    np.savez(path, meta=np.frombuffer(b"[1]", np.uint8))
    with pytest.raises(FileError, match="not that of a scores file"):
        Scores.load(path)


def test_one_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "s.npz"
    example().save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"neuron_fisher.npy") + 160] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="not a readable scores file"):
        Scores.load(path)


def test_other_format_missing_array_and_pickle(tmp_path):
    path = tmp_path / "s.npz"
    meta = np.frombuffer(b'{"format": 99, "meta": {}}', np.uint8)
    np.savez(path, meta=meta)
    with pytest.raises(FileError, match="format must be 1, got 99"):
        Scores.load(path)
    meta = np.frombuffer(b'{"format": 1, "meta": {}}', np.uint8)
    np.savez(path, meta=meta, head_fisher=np.ones((1, 1)))
    with pytest.raises(FileError, match=r"missing \['neuron_fisher'"):
        Scores.load(path)
    np.savez(path, meta=np.array([{}], dtype=object))
    with pytest.raises(FileError, match="not a readable scores file"):
        Scores.load(path)


def test_a_packed_file_and_a_header_out_of_bounds_are_refused(tmp_path):
    """A megabyte can hold gigabytes when it is packed; floe packs nothing."""
    path = tmp_path / "s.npz"
    np.savez_compressed(path, meta=np.frombuffer(b'{"format": 1, "meta": {}}', np.uint8))
    with pytest.raises(FileError, match=r"meta\.npy must be stored as it is"):
        Scores.load(path)
    np.savez(
        path, meta=np.frombuffer(b'{"format": 1, "meta": {"rows": 1' + b"0" * 400 + b"}}", "u1")
    )
    with pytest.raises(FileError, match=r"meta\.rows must be a whole number of at most 63 bits"):
        Scores.load(path)
    np.savez(path, meta=np.frombuffer(b"[" * 100_000, np.uint8))
    with pytest.raises(FileError, match="not that of a scores file"):
        Scores.load(path)


def test_bad_values_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "s.npz"
    example().save(path)
    with zipfile.ZipFile(path) as archive:
        arrays = {
            n.removesuffix(".npy"): np.load(io.BytesIO(archive.read(n))) for n in archive.namelist()
        }
    arrays["adapter_fisher"][0] = -1
    np.savez(path, **arrays)
    with pytest.raises(FileError, match=r"s\.npz: adapter_fisher must be finite"):
        Scores.load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    example().save(path)
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(FileError, match="No space left"):
        full().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_meta_must_be_json():
    with pytest.raises(TypeError, match="not JSON serializable"):
        example(meta={"model": object()})


def test_loads_neither_torch_nor_transformers():
    code = (
        "import sys, floe.importance.scores; "
        "sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
