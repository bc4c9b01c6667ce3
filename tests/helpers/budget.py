"""The error a kernel may have: twice torch's own in the same dtype, both against float64."""

import torch


def relative_error(actual, exact):
    """RMS of the error over RMS of ``exact``; a NaN anywhere in ``actual`` gives NaN."""
    difference = (actual.detach().double() - exact.detach().double()).norm()
    return float(difference / exact.detach().double().norm().clamp_min(1e-300))


def assert_within_budget(actual, torchs, exact, name="result", rounded_to=None):
    """``actual`` may be off by twice what ``torchs`` is, or by one last rounding of its own dtype.

    ``exact`` is float64. ``rounded_to``: the computation's coarsest dtype, if not ``actual``'s.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert actual.dtype == torchs.dtype, f"{name}: {actual.dtype} != {torchs.dtype}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(rounded_to or actual.dtype).eps / 2
    allowed = max(2 * relative_error(torchs, exact), rounding)
    error = relative_error(actual, exact)
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"
