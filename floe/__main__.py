"""``python -m floe`` is the ``floe`` command."""

from floe.cli import main

main()
