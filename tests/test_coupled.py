import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from floe.selection.coupled import (
    closing_loss,
    gate_fisher,
    gate_fisher_diagonal,
    gate_matrix,
    keep_layers,
)


def brute_force(matrix, linear):
    """Least loss for every number of kept layers, over all 2^L sets."""
    total = len(matrix)
    closed = ((np.arange(2**total)[:, None] >> np.arange(total)) & 1).astype(float)
    loss = ((closed @ matrix) * closed).sum(axis=1) / 2 - closed @ linear
    kept = total - closed.sum(axis=1).astype(int)
    return [loss[kept == count].min() for count in range(total + 1)]


def instance(seed):
    """Positive semidefinite or not, with a linear term or not, integers (full of ties) or not."""
    rng = np.random.default_rng(seed)
    total = int(rng.integers(1, 15 if seed % 10 == 0 else 10))
    if seed % 4 == 0:
        rows = rng.normal(size=(int(rng.integers(1, 12)), total)) * rng.lognormal(0, 1, total)
        matrix = rows.T @ rows
    elif seed % 4 == 1:
        rows = rng.integers(-2, 3, (4, total)).astype(float)
        matrix = rows.T @ rows
    elif seed % 4 == 2:
        matrix = rng.normal(size=(total, total))
        matrix = matrix + matrix.T
    else:
        matrix = rng.integers(-1, 2, (total, total)).astype(float)
        matrix = matrix + matrix.T
    return matrix, rng.normal(size=total) if seed % 3 == 0 else np.zeros(total)


@pytest.mark.parametrize("block", range(8))
def test_no_choice_loses_less(block):
    """More than 5,000 problems: 1,000 instances, every number of layers from none to all."""
    for seed in range(125 * block, 125 * (block + 1)):
        matrix, linear = instance(seed)
        for count, least in enumerate(brute_force(matrix, linear)):
            found = keep_layers(matrix, count, linear)
            closed = [k for k in range(len(matrix)) if k not in found.layers]
            assert len(found.layers) == count
            assert found.loss == pytest.approx(least, abs=1e-9), (seed, count)
            assert found.loss == pytest.approx(closing_loss(matrix, closed, linear), abs=1e-9)
            assert found.lower_bound <= least + 1e-9
            assert found.optimal


def test_there_are_more_than_five_thousand():
    assert sum(len(instance(seed)[0]) + 1 for seed in range(1000)) > 5000


def test_ties_keep_the_lower_layers():
    for matrix in (np.zeros((30, 30)), np.ones((30, 30)), np.eye(30)):
        for count in (0, 1, 8, 15, 29, 30):
            found = keep_layers(matrix, count)
            assert found.layers == tuple(range(count))
            assert found.optimal
            assert found.nodes < 1000
    alike = np.ones((2, 4))  # layers 0 and 2 are one, so are 1 and 3, and they cancel nothing
    alike[0, 1] = alike[0, 3] = 0
    assert keep_layers(alike.T @ alike, 1).layers == (0,)


def test_opposite_layers_close_together():
    """Alone, 2 is the cheapest to close; 0 and 1 cancel, so closing both is free."""
    rows = np.array([[3.0, -3.0, 1.0, 2.0]])
    matrix = rows.T @ rows
    assert keep_layers(matrix, 3).layers == (0, 1, 3)
    assert keep_layers(matrix, 2).layers == (2, 3)
    assert keep_layers(np.diag(np.diag(matrix)), 2).layers == (0, 1)


def test_the_first_order_term_counts():
    assert keep_layers(np.eye(3), 2, [0, 0, 1.0]).layers == (0, 1)
    assert keep_layers(np.eye(3), 2, [0, 1.0, 0]).layers == (0, 2)
    assert keep_layers(np.eye(3), 2, [0, 1.0, 0]).loss == pytest.approx(-0.5)


def realistic(total, seed, samples=256):
    """Layers that share four directions, of very different size, over heavy-tailed rows."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(samples, 4)) @ rng.normal(size=(4, total))
    rows = shared + 0.7 * rng.normal(size=(samples, total))
    rows = rows * rng.lognormal(0, 0.8, total) * rng.lognormal(0, 1, (samples, 1))
    return rows.T @ rows


def test_thirty_layers_are_proven_at_any_count():
    slowest, matrix = 0.0, realistic(30, 0)
    for count in range(31):
        start = time.perf_counter()
        found = keep_layers(matrix, count)
        slowest = max(slowest, time.perf_counter() - start)
        assert found.optimal
        assert found.gap <= 1e-9 * found.loss
        diagonal = keep_layers(np.diag(np.diag(matrix)), count)
        closed = [k for k in range(30) if k not in diagonal.layers]
        assert found.loss <= closing_loss(matrix, closed) * (1 + 1e-12)
    assert slowest < 1


def test_a_node_limit_leaves_a_bound():
    matrix = realistic(60, 0)
    best = keep_layers(matrix, 15)
    assert best.optimal
    for nodes in (0, 1, 20):
        found = keep_layers(matrix, 15, max_nodes=nodes)
        assert found.nodes <= nodes
        assert not found.optimal
        assert found.lower_bound <= best.loss * (1 + 1e-9)
        assert found.loss >= best.loss * (1 - 1e-9)
        assert repr(found) == repr(keep_layers(matrix, 15, max_nodes=nodes))


def test_renaming_layers_renames_the_choice():
    matrix = realistic(20, 3)
    order = np.random.default_rng(0).permutation(20)
    found = keep_layers(matrix[np.ix_(order, order)], 7).layers
    assert sorted(order[list(found)].tolist()) == list(keep_layers(matrix, 7).layers)


HARD = """
import signal
import threading
import numpy as np
from floe.selection.coupled import keep_layers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
rows = np.random.default_rng(0).normal(size=(6, 100))
ticks, done = [], threading.Event()

def tick():
    while not done.wait(0.005):
        ticks.append(1)

thread = threading.Thread(target=tick)
thread.start()
print("go", flush=True)
before = len(ticks)
try:
    keep_layers(rows.T @ rows + 0.1 * np.eye(100), 50, max_nodes=10**12)
    print("ended")
except KeyboardInterrupt:
    print("interrupted", "meanwhile" if len(ticks) > before + 10 else "alone")
done.set()
thread.join()
"""


def test_ctrl_c_ends_a_long_search_and_other_threads_run_meanwhile():
    with subprocess.Popen([sys.executable, "-c", HARD], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "go\n"
        timer = threading.Timer(1.0, os.kill, (child.pid, signal.SIGINT))
        timer.start()
        try:
            assert child.communicate(timeout=60)[0] == "interrupted meanwhile\n"
        finally:
            timer.cancel()
            child.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3)), 1), r"matrix must be \[L, L\]"),
        ((np.ones((2, 2)), 1, [1.0]), r"matrix must be \[L, L\] and linear \[L\]"),
        ((np.ones((2, 2)), 3), r"count must be in \[0, 2\], got 3"),
        ((np.ones((2, 2)), -1), "count must be in"),
        (([[1.0, 2.0], [0.0, 1.0]], 1), r"symmetric, got 2.0 at \[0, 1\] and 0.0 at \[1, 0\]"),
        (([[np.nan, 0.0], [0.0, 1.0]], 1), "matrix must be finite"),
        ((np.eye(2), 1, [np.inf, 0.0]), "must be finite, got inf"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        keep_layers(*arguments)


def situation(gradient, count):
    return SimpleNamespace(
        scores=SimpleNamespace(gate_gradient=gradient), count=count, total=gradient.shape[1]
    )


def test_gradients_of_projections_add_up_to_those_of_layers():
    gradient = np.random.default_rng(0).normal(size=(9, 5, 3)).astype(np.float32)
    matrix, linear = gate_matrix(gradient)
    layers = gradient.astype(float).sum(axis=2)
    expected = sum(np.outer(row, row) for row in layers)
    assert matrix == pytest.approx(expected)
    assert linear == pytest.approx(layers.sum(axis=0))
    assert gate_matrix(layers)[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"must be \[S, L, P\] or \[S, L\] and finite"):
        gate_matrix(np.full((2, 2), np.nan))


def test_the_policy_ranks_the_exact_choice_first():
    gradient = np.random.default_rng(1).normal(size=(20, 9, 3)).astype(np.float32)
    gradient[:, 4] = -gradient[:, 2]
    matrix, _ = gate_matrix(gradient)
    for count in range(1, 10):
        scores = gate_fisher(situation(gradient, count))
        order = np.argsort(-scores, kind="stable")
        kept = order[:count]
        assert sorted(kept.tolist()) == list(keep_layers(matrix, count).layers)
        closed = sorted(set(range(9)) - set(kept.tolist()))
        nothing = closing_loss(matrix, closed)
        next_loss = [closing_loss(matrix, [*closed, k]) - nothing for k in kept]
        assert next_loss == pytest.approx(sorted(next_loss, reverse=True))
        saved = [nothing - closing_loss(matrix, [c for c in closed if c != k])
                 for k in order[count:]]  # fmt: skip
        assert saved == pytest.approx(sorted(saved, reverse=True))
        assert np.unique(scores).size == 9


def test_the_diagonal_policy_is_each_gate_alone():
    gradient = np.random.default_rng(1).normal(size=(20, 6, 2))
    found = gate_fisher_diagonal(situation(gradient, 2))
    assert found == pytest.approx((gradient.sum(axis=2) ** 2).sum(axis=0))
    chosen = tuple(sorted(np.argsort(-found)[:2].tolist()))
    assert chosen == keep_layers(np.diag(found), 2).layers


@pytest.mark.parametrize("policy", [gate_fisher, gate_fisher_diagonal])
def test_policies_say_what_to_measure(policy):
    bare = SimpleNamespace(scores=SimpleNamespace(), count=2, total=4)
    with pytest.raises(
        ValueError, match=r"needs scores.gate_gradient, got None; floe.score measures it"
    ):
        policy(bare)
    with pytest.raises(ValueError, match=r"gate_gradient must be \[S, 4, P\] with S > 0"):
        policy(SimpleNamespace(
            scores=SimpleNamespace(gate_gradient=np.ones((3, 5, 1))), count=2, total=4
        ))  # fmt: skip
