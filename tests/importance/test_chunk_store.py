import numpy as np
import pytest

from floe.errors import FileError
from floe.importance.chunk_store import Workbook


def arrays(place):
    return {"sum": np.full(3, float(place)), "count": np.array(place)}


def test_pieces_are_done_once_and_found_again(tmp_path):
    done = []

    def build(place):
        done.append(place)
        return arrays(place)

    for _ in range(2):
        book = Workbook(tmp_path / "pieces", {"rows": 3})
        book.work(["a", "b", "c"], build)
    assert done == [0, 1, 2]
    assert book.take("b")["sum"].tolist() == [1.0, 1.0, 1.0]
    other = Workbook(tmp_path / "pieces", {"rows": 4})
    assert list(other.missing(["a", "b", "c"])) == [(0, "a"), (1, "b"), (2, "c")]
    with pytest.raises(FileError, match=r"a\.npz: must hold a finished piece"):
        other.take("a")


def test_a_damaged_piece_is_done_again(tmp_path):
    book = Workbook(tmp_path, {})
    book.work(["a", "b"], arrays)
    file = tmp_path / "a.npz"
    file.write_bytes(file.read_bytes()[:-30])
    assert [name for _, name in book.missing(["a", "b"])] == ["a"]


def test_without_a_folder_pieces_stay_in_memory():
    book = Workbook(None, {})
    book.work(["a"], arrays)
    assert list(book.missing(["a"])) == []
    assert book.take("a")["count"] == 0


def test_an_interrupted_build_leaves_what_was_finished(tmp_path):
    def build(place):
        if place == 1:
            raise KeyboardInterrupt
        return arrays(place)

    with pytest.raises(KeyboardInterrupt):
        Workbook(tmp_path, {}).work(["a", "b"], build)
    assert [name for _, name in Workbook(tmp_path, {}).missing(["a", "b"])] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
