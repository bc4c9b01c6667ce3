"""Tests of the Triton kernels, run by Triton's interpreter: numpy on the CPU, no GPU.

Triton decides at the first import of a kernel whether it is interpreted, so these tests need a
process of their own with TRITON_INTERPRET=1: tests/kernels/test_triton_kernels.py starts it. The
interpreter computes bfloat16 wrongly (its bits are taken for integers), so nothing here uses it.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
