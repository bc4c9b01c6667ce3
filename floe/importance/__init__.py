"""Importance of heads, neurons and layers: Fisher information and Taylor cost (FLoE Eq. 4-11).

Import from the modules: ``scores`` (the artifact, needs numpy alone) and ``score`` (measures it,
needs torch).
"""
