"""Names of the array, batch and callback types that several packages share; no torch here."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

Batch = Mapping[str, Any]  # "input_ids" [S, T], and what else the model's forward takes
Progress = Callable[[int, int, str], None]  # done, total, what
