"""Every way to route, on the kernels' path, forward and backward, against plain loops."""

import pytest
import torch
from helpers import routing
from helpers.attack import trials
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure


@pytest.mark.parametrize("kind", routing.KINDS)
@settings(max_examples=trials(500, share=50), deadline=None, derandomize=True, phases=PHASES)
@given(
    backend=st.sampled_from(["gemm", "fused"]),
    function=st.sampled_from([routing.moe_lora_group, routing.on_base]),
    **routing.shapes,
)
def test_any_shape(kind, backend, function, **shape):
    given = routing.case(kind, **shape)
    routing.check(given, torch.float32, torch.float32, backend, function)


@pytest.mark.parametrize("kind", routing.KINDS)
@pytest.mark.parametrize("tokens", [16, 40])
def test_many_columns_are_summed_in_parts(kind, tokens):
    given = routing.case(kind, tokens, 700, 6, 5, linears=2, seed=3)
    routing.check(given, torch.float32, torch.float32, "gemm")


def test_ties_go_to_the_lower_index():
    given = routing.case("top_k", 20, 8, 3, 6, seed=1)  # 2 of 6
    given.leaves["shrink"][0][3:] = 0.0
    given.leaves["router_bias"][0][:] = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    routing.check(given, torch.float32, torch.float32, "gemm")
