"""The Triton kernels, each beside the function that launches it.

One vocabulary: ``tokens``, ``columns`` (of x), ``features`` (of y), LINEARS (G), RANK (r), EXPERTS
(M) are sizes; an index along one is its singular (``token``, ``column``, ...). BLOCK_* are a tile's
sizes and PAD_* sizes rounded up to powers of two. Every load and product names its shape.
"""
