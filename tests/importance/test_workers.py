"""One, two and three workers of torchrun, any batch size: the same scores, byte for byte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.scoring_worker import scores

TESTS = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}


def launch(workers, *arguments):
    script = [str(TESTS / "helpers/scoring_worker.py"), *map(str, arguments)]
    return subprocess.run(
        [*LAUNCH, f"--nproc-per-node={workers}", *script],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As torchrun's workers have; what other tests find is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "scores.npz"
    scores(8).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(("workers", "size"), [(1, 3), (2, 1), (3, 8)])
def test_the_same_bytes(workers, size, expected, tmp_path):
    done = launch(workers, tmp_path / "scores.npz", tmp_path / "pieces", size)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(workers):
        assert (tmp_path / f"scores.npz.{number}").read_bytes() == expected
    pieces = {"taylor.npz"} | {f"{n}-{i:05d}.npz" for n in ("fisher", "probe") for i in range(3)}
    assert {file.name for file in (tmp_path / "pieces").iterdir()} == pieces


def test_what_one_worker_left_another_number_of_workers_finishes(expected, tmp_path):
    done = []

    def stop_in_the_second_chunk(done_rows, total, what):
        done.append((done_rows, what))
        if what == "fisher" and done_rows > 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(5, tmp_path / "pieces", progress=stop_in_the_second_chunk)
    left = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "pieces").iterdir()}
    assert set(left) == {"taylor.npz", "fisher-00000.npz"}
    finished = launch(2, tmp_path / "scores.npz", tmp_path / "pieces", 4)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "scores.npz.1").read_bytes() == expected
    for name, time in left.items():
        assert (tmp_path / "pieces" / name).stat().st_mtime_ns == time


def test_workers_need_a_folder_and_the_same_rows():
    script = (
        "import os, sys; sys.path.insert(0, os.environ['PYTHONPATH'])\n"
        "from torch import distributed; distributed.init_process_group('gloo')\n"
        "from floe.importance.chunk_store import Workbook\n"
        "for folder, rows in ((None, 1), ('.', distributed.get_rank())):\n"
        "    try: Workbook(folder, {'rows': rows})\n"
        "    except ValueError as error: print(error, flush=True)\n"
        "distributed.destroy_process_group()\n"
    )
    done = subprocess.run(
        [*LAUNCH, "--nproc-per-node=2", "--no-python", sys.executable, "-c", script],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.count("folder must be one that all 2 workers share, got None") == 2
    assert done.stdout.count("got others in workers [1] than in worker 0") == 2
