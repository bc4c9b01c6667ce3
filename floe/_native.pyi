from collections.abc import Callable
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class _Totals(TypedDict):
    value: float
    cost: float
    masked_value: float
    masked_cost: float

# "lambda" is a keyword in Python, so this dictionary cannot be spelled as a class.
_TwoClass = TypedDict(
    "_TwoClass",
    {
        "value": float,
        "cost": float,
        "masked_value": float,
        "masked_cost": float,
        "head_mask": NDArray[np.bool_],
        "neuron_mask": NDArray[np.bool_],
        "upper_bound": float,
        "lambda": float,
    },
)
_Knapsack = TypedDict(
    "_Knapsack",
    {
        "value": float,
        "cost": float,
        "masked_value": float,
        "masked_cost": float,
        "mask": NDArray[np.bool_],
        "upper_bound": float,
        "lambda": float,
        "optimal": bool,
        "nodes": int,
    },
)

class _Refinement(_Totals):
    mask: NDArray[np.bool_]
    repairs: int
    adds: int
    swaps: int
    converged: bool

def solve_two_class(
    head_value: NDArray[np.float64],
    neuron_value: NDArray[np.float64],
    head_cost: float,
    neuron_cost: float,
    budget: float,
    literal: bool,
) -> _TwoClass: ...
def solve_knapsack(
    value: NDArray[np.float64],
    cost: NDArray[np.float64],
    budget: float,
    max_nodes: int,
    seconds: float,
    progress: Callable[[int], object] | None,
) -> _Knapsack: ...
def refine(
    value: NDArray[np.float64],
    cost: NDArray[np.float64],
    budget: float,
    start: NDArray[np.bool_],
    layers: int,
    heads: int,
    neurons: int,
    pairs: str,
    literal: bool,
    max_moves: int,
    progress: Callable[[int], object] | None,
) -> _Refinement: ...
def allocate(
    gain: NDArray[np.float64],
    cost: NDArray[np.int64],
    budget: int,
    progress: Callable[[int], object] | None,
) -> NDArray[np.int64]: ...
def allocate_bound(gain: NDArray[np.float64], cost: NDArray[np.int64], budget: int) -> float: ...
def build_info() -> dict[str, str | int]: ...
