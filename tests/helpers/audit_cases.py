"""Hand-made scores for the audit's tests."""

import numpy as np

from floe.importance.scores import Scores
from floe.selection.audit import audit

L, H, NEURONS, P, S, K = 6, 3, 8, 2, 20, 2


def make(seed=0, levels=None, keep=True, **changes):
    """Scores whose Fisher information is the sum over their rows; layer k's level is levels[k]."""
    rng = np.random.default_rng(seed)
    level = np.sqrt(np.arange(1, L + 1) if levels is None else levels)
    head = (rng.standard_normal((S, L, H)) * level[:, None]).astype(np.float32)
    neuron = (rng.standard_normal((S, L, NEURONS)) * level[:, None]).astype(np.float32)
    samples = rng.exponential(size=(S, L)) * level**2
    gates = (rng.standard_normal((S, L, P)) * level[:, None]).astype(np.float32)
    values = {
        "head_fisher": np.square(head, dtype=np.float64).sum(axis=0),
        "neuron_fisher": np.square(neuron, dtype=np.float64).sum(axis=0),
        "head_taylor": rng.random((L, H)) + 0.5,
        "neuron_taylor": rng.random((L, NEURONS)) + 0.1,
        "adapter_fisher": samples.sum(axis=0),
        "adapter_samples": samples,
        "gate_gradient": gates,
        "meta": {"reduction": "sample"},
    }
    if keep:
        values |= {"head_gradient": head, "neuron_gradient": neuron}
    return Scores(**(values | changes))


def light(**changes):
    """Scores with the adapters' rows alone: quick to resample."""
    return make(**({"keep": False, "gate_gradient": None} | changes))


def run(scores, **changes):
    return audit(scores, **({"layers": K, "bootstrap": 30, "seed": 3} | changes))


def named(results, name):
    return next(one for one in results if one.name == name)
