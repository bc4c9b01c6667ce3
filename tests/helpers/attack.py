"""How many wrong inputs an attack tries: some in the suite, all of them in ``make attack``."""

import os


def trials(full, share=10):
    """``full`` under ``make attack``, else one in ``share`` of them."""
    return full if os.environ.get("FLOE_ATTACK") == "full" else -(-full // share)
