"""Running a function of ``workers`` in a process of its own that the test kills with SIGKILL.

The processes are forked from a server that has imported everything but run nothing, so each costs a
fraction of a second instead of the five that importing torch and transformers takes.
"""

import multiprocessing
import os
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start(function, folder, *arguments):
    """Begin ``workers.<function>(folder, ...)`` in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.workers"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), before])
    try:  # the server reads it when the first process starts
        process = context.Process(target=call, args=(function, str(folder), *arguments))
        process.start()
    finally:
        os.environ["PYTHONPATH"] = before
    return process


def call(function, *arguments):
    from helpers import workers

    getattr(workers, function)(*arguments)


def run(function, folder, *arguments):
    """To the end; fails if the process does."""
    process = start(function, folder, *arguments)
    process.join(120)
    code = process.exitcode
    process.close()
    assert code == 0


def kill_after(process, progress, count, delay):
    """SIGKILL ``delay`` s after file ``progress`` grew by ``count`` lines; True if it was alive."""
    size = lines(progress)
    deadline = time.monotonic() + 120
    while lines(progress) < size + count and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join(60)
    code = process.exitcode
    process.close()
    assert code in (0, -9)
    return code == -9


def lines(path):
    return Path(path).read_bytes().count(b"\n") if Path(path).exists() else 0
