"""How many wrong inputs an attack tries: a tenth in the suite, all of them in ``make attack``."""

import os


def trials(full):
    """``full`` under ``make attack``, else a tenth of it."""
    return full if os.environ.get("FLOE_ATTACK") == "full" else -(-full // 10)
