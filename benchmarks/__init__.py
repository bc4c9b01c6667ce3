"""Measurements of floe against what else could be used; each refuses to time a wrong result."""

from floe.machine import share_cores

share_cores()
