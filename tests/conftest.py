"""Every test starts from one seed, and unwritten memory shows as NaN."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: threads of one would wait for another's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may need the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def reproducible():
    """Seed torch, and let deterministic mode fill every torch.empty with NaN.

    The number of threads, which decides the last bits of sums, is put back for the tests after.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
