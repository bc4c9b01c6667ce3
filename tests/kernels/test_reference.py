"""The plain-torch definitions against numbers worked out by hand, and the mask's generator."""

import math

import pytest
import torch
from floe_triton import draw_seed, dropout, keyed_dropout, product_form, reference
from floe_triton.group import Group, Needs

SEED = torch.tensor(1234567890123456789)

# One example: X, frozen W = I, A, two experts B_i, router R = I, scaling 2, gradient of ones.
X = [[1.0, 0.0], [2.0, 1.0]]
SHRINK = [[1.0, -1.0], [1.0, 0.0], [0.0, 1.0]]
EXPERTS = [[[1.0], [0.0]], [[0.0], [2.0]]]
GATE = [[0.73105858, 0.26894142]] * 2
KEEP = torch.tensor(
    [[True, False], [True, True]]
)  # times 1 / (1 - 0.5): the multiplier [[2, 0], [2, 2]]

PLAIN = {
    "hidden": [[1.0], [1.0]],
    "y": [[2.46211716, 1.07576569], [3.46211716, 2.07576569]],
    "gate_grad": [[2.0, 4.0]] * 2,
    "logit_grad": [[-0.39322387, 0.39322387]] * 2,
    "expert_1": [[2.92423431], [2.92423431]],
    "expert_2": [[1.07576569], [1.07576569]],
    "a": [7.61364853, 2.53788284],
    "router": [-1.17967160, -0.39322387],
    "x": [[3.14465898, -1.14465898]] * 2,
}
DROPPED = {
    "hidden": [[2.0], [2.0]],
    "y": [[3.92423431, 2.15153137], [4.92423431, 3.15153137]],
    "gate_grad": [[4.0, 8.0]] * 2,
    "logit_grad": [[-0.78644773, 0.78644773]] * 2,
    "expert_1": [[5.84846863], [5.84846863]],
    "expert_2": [[2.15153137], [2.15153137]],
    "a": [15.22729706, 5.07576569],
    "router": [-2.35934320, -0.78644773],
    "x": [[5.28931795, 1.78644773], [5.28931795, -3.28931795]],
}
CASES = pytest.mark.parametrize(
    ("wanted", "dropout_p"), [(PLAIN, 0.0), (DROPPED, 0.5)], ids=["plain", "dropout"]
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def example():
    x, shrink = tensor(X).requires_grad_(), tensor(SHRINK).requires_grad_()
    expand = tensor(EXPERTS).transpose(0, 1).contiguous().requires_grad_()  # [N, M, r]
    return x, shrink, expand


def equal(actual, wanted):
    torch.testing.assert_close(actual.detach(), tensor(wanted), rtol=0, atol=2e-8)


@pytest.fixture
def fixed_mask(monkeypatch):
    """Dropout with the example's mask, in the definition and in the product form alike."""
    monkeypatch.setattr(reference, "dropout_keep", lambda *_: KEEP)
    monkeypatch.setattr(product_form, "keyed_dropout", reference.dropout)


def check_gradients(wanted, x, shrink, expand):
    equal(expand.grad[:, 0], wanted["expert_1"])
    equal(expand.grad[:, 1], wanted["expert_2"])
    equal(shrink.grad[0], wanted["a"])
    equal(shrink.grad[1], wanted["router"])
    equal(shrink.grad[2], [-value for value in wanted["router"]])
    equal(x.grad, wanted["x"])


@CASES
def test_the_definition_gives_the_worked_example(wanted, dropout_p, fixed_mask):
    x, shrink, expand = example()
    y = reference.moe_lora(
        x, torch.eye(2).double(), None, shrink, expand, scaling=2.0, dropout_p=dropout_p, seed=SEED
    )
    equal(reference.gate(x, shrink[1:]), GATE)
    equal(y, wanted["y"])
    y.backward(torch.ones_like(y))
    check_gradients(wanted, x, shrink, expand)


@CASES
def test_the_product_form_gives_the_worked_example_step_by_step(wanted, dropout_p, fixed_mask):
    x, shrink, expand = (t.detach() for t in example())
    seed = SEED if dropout_p else None
    weights = [torch.eye(2).double()]
    group = Group(weights, [None], [], [shrink], [expand], [None], 2.0, 1.0, dropout_p, seed)
    (y,), routed = product_form.forward(x, group)
    equal(y, wanted["y"])
    equal(routed.hidden[0], wanted["hidden"])
    equal(routed.gate[0], GATE)
    grad_y = torch.ones_like(y)
    grads, _ = product_form.grads_of_products([grad_y], group, routed)
    equal(grads[:, group.hidden_size :], wanted["logit_grad"])
    found = product_form.backward([grad_y], x, group, routed, Needs(True, True, True, False))
    x.grad, shrink.grad, expand.grad = found.x, found.shrink[0], found.expand[0]
    check_gradients(wanted, x, shrink, expand)


@CASES
def test_the_gate_s_own_gradient_is_that_of_the_worked_example(
    wanted, dropout_p, fixed_mask, monkeypatch
):
    kept = []
    define = reference.gate

    def watched(x, router, *settings):
        kept.append(define(x, router, *settings))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(reference, "gate", watched)
    x, shrink, expand = example()
    reference.moe_lora_delta(
        x, shrink, expand, scaling=2.0, dropout_p=dropout_p, seed=SEED
    ).sum().backward()
    equal(kept[0].grad, wanted["gate_grad"])


def test_experts_of_zero_give_gradients_to_themselves_alone():
    x, shrink, expand = example()
    with torch.no_grad():
        expand.zero_()
    y = reference.moe_lora(x, torch.eye(2).double(), None, shrink, expand, scaling=2.0)
    y.backward(torch.ones_like(y))
    equal(shrink.grad, torch.zeros(3, 2).tolist())
    equal(expand.grad[:, 0], PLAIN["expert_1"])
    equal(expand.grad[:, 1], PLAIN["expert_2"])


@pytest.mark.parametrize("router", ["zero", "random"])
def test_only_a_random_router_ever_tells_experts_apart(router):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, target, weight = draw(64, 6), draw(64, 5), draw(5, 6)
    shrink, expand = (
        draw(2 + 4, 6),
        torch.zeros(5, 4, 2, dtype=torch.float64),
    )  # gates of exactly 1/4
    if router == "zero":
        shrink[2:] = 0
    parameters = [shrink.requires_grad_(), expand.requires_grad_()]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    for _ in range(50):
        loss = (
            (reference.moe_lora(x, weight, None, *parameters, scaling=1.0) - target).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spread = (expand - expand[:, :1]).abs().max().item()
    assert expand.abs().max() > 0.1  # it did learn
    assert (spread == 0.0) == (router == "zero")
    assert (shrink[2:].abs().max().item() == 0.0) == (router == "zero")


def test_bias_is_added_once():
    x, shrink, expand = example()
    y = reference.moe_lora(
        x, torch.eye(2).double(), tensor([10.0, 20.0]), shrink, expand, scaling=2.0
    )
    equal(y, [[a + b for a, b in zip(row, (10.0, 20.0), strict=True)] for row in PLAIN["y"]])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
    ids=["zeros", "ones"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    found = reference.philox((torch.tensor(counter),) * 4, torch.tensor(key), rounds=10)
    assert [int(word) for word in found] == words


def philox_by_hand(counter, key, rounds):
    """Philox-4x32 in Python's unbounded integers: shares nothing with the one tested."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        even, odd = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(odd >> 32) ^ c[1] ^ k[0], odd % 2**32, (even >> 32) ^ c[3] ^ k[1], even % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("seed", [0, 5, 2**62 - 1, -3])
def test_the_mask_is_byte_c_of_the_row_s_words(seed):
    keep = reference.dropout_keep(40, 70, 0.3, torch.tensor(seed))
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for row, column in [(0, 0), (1, 1), (7, 15), (7, 16), (39, 69), (20, 33)]:
        word = philox_by_hand((column // 16, row, 0, 0), key, 7)[column % 16 // 4]
        assert bool(keep[row, column]) == ((word >> 8 * (column % 4)) % 256 >= 77)


def test_a_block_of_the_mask_is_the_mask_of_the_block():
    whole = reference.dropout_keep(50, 100, 0.4, SEED)
    for rows, cols in [(1, 1), (3, 17), (50, 16), (49, 99), (0, 5), (5, 0)]:
        assert torch.equal(whole[:rows, :cols], reference.dropout_keep(rows, cols, 0.4, SEED))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_looks_independent(p):
    """Rate, spread, correlation with shifted and reseeded copies: each within 4.5 sigma."""
    rows, cols = 512, 512
    keep = reference.dropout_keep(rows, cols, p, SEED).double()
    rate = 1 - reference.dropout_threshold(p) / 256
    assert abs(rate - (1 - p)) <= 0.5 / 256
    sigma = math.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - rate) < 4.5 * sigma / math.sqrt(keep.numel())
    for axis in (0, 1):  # variance of the means: chi-square of 511 degrees of freedom
        ratio = keep.mean(axis).var() * rows / sigma**2
        assert abs(ratio - 1) < 4.5 * math.sqrt(2 / (rows - 1))
    centred = (keep - rate) / sigma
    others = [centred.roll(lag, 1) for lag in (1, 2, 3, 4, 15, 16, 17, 32, 64)]
    others += [centred.roll(lag, 0) for lag in (1, 2, 16)]
    for seed in (SEED + 1, SEED + 2**32, -SEED):
        others.append((reference.dropout_keep(rows, cols, p, seed).double() - rate) / sigma)
    for other in others:
        assert abs((centred * other).mean()) < 4.5 / math.sqrt(keep.numel())


def test_dropout_keeps_the_mean_and_counts_rows_over_all_leading_dimensions():
    x = torch.ones(4, 32, 48, dtype=torch.float64)
    dropped = reference.dropout(x, 0.05, SEED)
    assert set(dropped.unique().tolist()) == {0.0, 256 / 243}
    assert torch.equal(dropped.flatten(0, 1), reference.dropout(x.flatten(0, 1), 0.05, SEED))
    assert reference.dropout_scale(0.05) * (1 - 13 / 256) == 1.0


def test_dropout_writes_zero_where_the_input_is_not_finite():
    dropped = reference.dropout(torch.full((8, 64), float("nan")), 0.5, SEED)
    keep = reference.dropout_keep(8, 64, 0.5, SEED)
    assert dropped[keep].isnan().all()
    assert (dropped[~keep] == 0).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_every_implementation_of_dropout_gives_the_same_bits(dtype):
    import floe.ops  # its C++ is the CPU's from then on

    assert floe.ops.keyed_dropout is keyed_dropout
    x = torch.randn(3, 7, 37).to(dtype)
    for p in (0.05, 0.5):
        expected = reference.dropout(x, p, SEED)
        assert torch.equal(keyed_dropout(x, p, SEED), expected)
        assert torch.equal(dropout._by_definition(x, p, SEED), expected)


def test_rows_done_in_parts_give_the_bits_of_the_whole(monkeypatch):
    x = torch.randn(5, 9, 40)
    monkeypatch.setattr(dropout, "_ELEMENTS_AT_ONCE", 7 * 40)
    found = dropout._by_definition(x, 0.3, SEED)
    assert torch.equal(found, reference.dropout(x, 0.3, SEED))
    assert dropout._by_definition(x[:0], 0.3, SEED).shape == (0, 9, 40)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_dropout_rates_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got"):
        reference.dropout_threshold(p)


def test_dropout_without_a_seed_is_refused():
    x, shrink, expand = example()
    with pytest.raises(
        ValueError, match="seed must be a 0-dim int64 tensor when dropout_p > 0, got None"
    ):
        reference.moe_lora_delta(x, shrink, expand, scaling=1.0, dropout_p=0.5)


def test_seeds_follow_torch_s_generator():
    torch.manual_seed(8)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(8)
    assert draw_seed(torch.device("cpu")) == first != second
    assert first.dtype == torch.int64
    assert first.dim() == 0
