"""What the workers of test_importance_workers run: score a tiny model with batches of some size."""

import sys

import torch
from torch import distributed

from floe.importance.score import score
from helpers.importance_models import adapted, batches

LENGTHS = [(5 + n % 5, 1 + n % 3) for n in range(70)]  # three chunks


def scores(size, folder=None, **options):
    """Scores of the tiny model from batches of ``size`` rows."""
    rows = batches(LENGTHS, size=size)
    return score(adapted(), rows, probe=True, keep_samples=True, folder=folder, **options)


if __name__ == "__main__":
    target, folder, size = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = scores(int(size), folder)
    found.save(f"{target}.{distributed.get_rank()}")
    distributed.destroy_process_group()
