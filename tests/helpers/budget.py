"""The error that tests allow a kernel: floe's own budget, asserted."""

from floe.selfcheck import error_budget, relative_error


def assert_within_budget(actual, torchs, exact, name="result", rounded_to=None):
    """``actual`` may be off by what `error_budget` allows beside ``torchs``.

    ``exact`` is float64. ``rounded_to``: the computation's coarsest dtype, if not ``actual``'s.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert actual.dtype == torchs.dtype, f"{name}: {actual.dtype} != {torchs.dtype}"
    allowed = error_budget(torchs, exact, rounded_to)
    error = relative_error(actual, exact)
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"
