"""Wrong and odd calls of every op: refused with a named error, or right by the definition."""

import inspect
import random
import time

import floe_triton
import pytest
import torch
from floe_triton import product_form, reference
from floe_triton.group import Group, Needs, Routed
from helpers.attack import trials
from helpers.budget import relative_error

from floe import ops
from floe.selection.masks import solvers

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CALLS = 5000  # of all ops together


class Subclass(torch.Tensor):
    pass


def draw(rng, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(*shape, generator=generator).to(dtype)


def sizes(rng):
    choose = rng.choice
    return choose([0, 1, 3, 40]), choose([0, 1, 6, 40]), choose([0, 1, 5, 33]), choose([1, 3])


def linears(rng, count):
    """A group's tensors by their names in the plural, and its settings."""
    tokens, columns, _, experts = sizes(rng)
    rank, dtype = rng.choice([1, 2, 5]), rng.choice(FLOATS)
    adapter = rng.choice([dtype, torch.float64 if dtype == torch.float64 else torch.float32])
    features = [sizes(rng)[2] for _ in range(count)]
    biased, routed, gated = (rng.random() < 0.5 for _ in range(3))
    hidden = rng.choice([rank, experts * rank])
    rows = hidden + (0 if gated else experts)
    return {
        "x": draw(rng, tokens, columns, dtype=dtype),
        "weights": [draw(rng, n, columns, dtype=dtype) for n in features],
        "biases": [draw(rng, n, dtype=dtype) if biased else None for n in features],
        "base_outputs": [draw(rng, tokens, n, dtype=dtype) for n in features],
        "shrink_weights": [draw(rng, rows, columns, dtype=adapter) for _ in features],
        "expand_weights": [draw(rng, n, experts, rank, dtype=adapter) for n in features],
        "router_biases": [draw(rng, experts) if routed and not gated else None for _ in features],
        "gates": [draw(rng, tokens, experts) for _ in features] if gated else [],
        "top_k": 0 if gated else rng.randint(0, experts),
        "scaling": rng.choice([0.5, 2.0]),
        "temperature": 1.0 if gated else rng.choice([1.0, 0.7]),
        "dropout_p": rng.choice([0.0, 0.4]),
        "seed": torch.tensor(rng.getrandbits(60)),
        "backend": rng.choice(["auto", "eager", "native"]),
    }


def group_of(given):
    fields = inspect.signature(Group).parameters
    group = Group(**{name: given.get(name, []) for name in fields if name != "top_k"})
    group.top_k = given.get("top_k", 0)
    if given.get("gated"):
        group.gates = list(given["gate"])
    return group


def forward_of(given):
    ys, routed = product_form.forward(given["x"], group_of(given))
    return [*ys, routed.hidden, routed.gate, routed.z]


def backward_of(given, products=False):
    routed = Routed(given["hidden"], given["gate"], given["z"])
    needs = [given[f"needs_{name}"] for name in ("x", "shrink", "expand")]
    found = product_form.backward(
        given["grad_ys"],
        given["x"],
        group_of(given),
        routed,
        Needs(*needs, given.get("needs_router_bias", False), given.get("needs_gates", False)),
    )
    empty = given["x"].new_empty(0)
    given_x = found.x if given["needs_x"] else empty
    own = [*found.router_bias, *found.gates]
    if products:
        group = group_of(given)
        grads, gates = product_form.grads_of_products(given["grad_ys"], group, routed)
        own = [grads, torch.stack(list(gates)) if group.gates else grads.new_empty(0)]
    return [given_x, *found.shrink, *found.expand, *own]


def saved_for(given, rng):
    """What a backward takes beside the forward's arguments."""
    ys, routed = product_form.forward(given["x"], group_of(given))
    needs = {f"needs_{name}": rng.random() < 0.7 for name in ("x", "shrink", "expand")}
    saved = {"hidden": routed.hidden, "gate": routed.gate, "z": routed.z}
    return {"grad_ys": ys, **given, **saved, **needs}


def raw_forward(rng):
    given = linears(rng, rng.choice([1, 2]))
    if rng.random() < 0.5:
        given |= {"weights": [], "biases": []}
    else:
        given["base_outputs"] = []
    return torch.ops.floe.moe_lora_forward, given, forward_of


def raw_backward(rng):
    _, given, _ = raw_forward(rng)
    given = saved_for(given, rng)
    given["needs_router_bias"] = given["router_biases"][0] is not None
    given["needs_gates"] = len(given["gates"]) > 0
    return torch.ops.floe.moe_lora_backward, given, backward_of


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


def experts(rng):
    given = without(linears(rng, rng.choice([1, 2])), "weights", "backend")
    keeps = rng.choice([("biases",), ("base_outputs",), ()])
    given |= {name: [] for name in ("biases", "base_outputs") if name not in keeps}

    def expected(given):
        base = given["base_outputs"]
        weights = [
            given["x"].new_zeros(len(e), given["x"].shape[1]) for e in given["expand_weights"]
        ]
        biases = given["biases"] or [None] * len(weights)
        return forward_of(given if base else {**given, "weights": weights, "biases": biases})

    return torch.ops.floe.moe_lora_experts, given, expected


def experts_backward(rng):
    given = without(linears(rng, rng.choice([1, 2])), "weights", "biases", "backend")
    given = without(saved_for(given, rng), "base_outputs", "router_biases")
    given["gated"] = len(given["gates"]) > 0
    given = without(given, "gates", "top_k")
    op = torch.ops.floe.moe_lora_experts_backward
    return op, given, lambda given: backward_of(given, products=True)


def public_group(rng):
    given = without(linears(rng, rng.choice([1, 2])), "base_outputs")
    given["dropout_mode"] = rng.choice(["shared", "shared", "per_expert"])
    return floe_triton.moe_lora_group, given, by_definition


def public_group_add(rng):
    given = without(linears(rng, rng.choice([1, 2])), "weights", "biases")
    return floe_triton.moe_lora_group_add, given, by_definition


def single(given):
    """The arguments of a group of one, in the singular."""
    gates = given["gates"]
    given = {SINGLE.get(k, k): v[0] if k in SINGLE else v for k, v in given.items()}
    return {**given, "gates": gates[0] if gates else None}


SINGLE = {
    "weights": "weight",
    "biases": "bias",
    "shrink_weights": "shrink_weight",
    "expand_weights": "expand_weight",
    "router_biases": "router_bias",
    "base_outputs": "base_output",
}


def public(rng):
    given = single(without(linears(rng, 1), "base_outputs"))
    return floe_triton.moe_lora, given, by_definition


def public_add(rng):
    given = single(without(linears(rng, 1), "weights", "biases"))
    return floe_triton.moe_lora_add, given, by_definition


def by_definition(given):
    """Of the public functions: ``reference.moe_lora`` of each linear, or its delta on a base."""
    given = without(given, "backend")
    settings = without(given, *SINGLE, *SINGLE.values(), "x", "gates")
    ys = []
    for g in range(len(given["expand_weights"]) if "expand_weights" in given else 1):
        own = {
            one: (given[many] or [None] * (g + 1))[g] if many in given else given.get(one)
            for many, one in SINGLE.items()
        }
        base, weight = own.pop("base_output", None), own.pop("weight", None)
        bias = own.pop("bias", None)
        gates = given["gates"]
        if isinstance(gates, list):
            gates = gates[g] if gates else None
        y = reference.moe_lora_delta(given["x"], gates=gates, **own, **settings)
        linear = torch.nn.functional.linear
        ys.append(y + (base if base is not None else linear(given["x"], weight, bias)))
    return ys


def dropout(op):
    def make(rng):
        tokens, columns, *_ = sizes(rng)
        given = {"x": draw(rng, 2, tokens, columns, dtype=rng.choice(FLOATS)), "p": 0.3}
        given["seed"] = torch.tensor(rng.getrandbits(60))
        return op, given, lambda given: [reference.dropout(**given)]

    return make


def site(rng):
    samples, tokens, _, units = sizes(rng)
    shape, dtype = (samples, rng.choice([tokens, 130]), units * 4), rng.choice(FLOATS)
    return {
        "activation": draw(rng, *shape, dtype=dtype),
        "gradient": draw(rng, *shape, dtype=dtype),
        "group_size": rng.choice([1, 2, 4]),
        "token_mask": rng.choice([None, draw(rng, *shape[:2]) > 0]),
    }


def gradients_of(given):
    product = given["activation"].double() * given["gradient"].double()
    if given["token_mask"] is not None:
        product = product * given["token_mask"][..., None]
    found = product.unflatten(2, (-1, given["group_size"])).sum((1, 3))
    wide = torch.promote_types(given["activation"].dtype, torch.float32)
    return [found.to(wide)]


def mask_gradients(op):
    return lambda rng: (op, site(rng), gradients_of)


def accumulate(op):
    def make(rng):
        given = site(rng)
        samples, _, columns = given["activation"].shape
        given["fisher"] = draw(rng, columns // given["group_size"], dtype=torch.float64).abs()
        scales = [None, draw(rng, samples, dtype=torch.float64), given["fisher"][:samples]]
        given["sample_scale"] = rng.choice(scales[: 2 + (samples <= len(given["fisher"]))])

        def expected(given):
            (found,), scale = gradients_of(given), given["sample_scale"]
            squares = (found.double() * (1 if scale is None else scale[:, None])).square()
            return [given["fisher"] + squares.sum(0)]

        return op, given, expected

    return make


def units(rng, count):
    return draw(rng, count, dtype=torch.float64).abs()


def totals(solution, *names):
    names = "value", "cost", "masked_value", "masked_cost", *names
    numbers = [float(getattr(solution, name)) for name in names]
    return torch.tensor(numbers, dtype=torch.float64)


def two_class(rng):
    given = {name: units(rng, rng.choice([0, 1, 7])) for name in ("head_value", "neuron_value")}
    given |= {"head_cost": 0.3, "neuron_cost": 0.1, "budget": rng.choice([0.5, 2, float("inf")])}
    given["literal"] = rng.random() < 0.3

    def expected(given):
        *numbers, literal = [float(v) if i > 1 else v for i, v in enumerate(given.values())]
        solve = solvers.solve_two_class_literal if literal else solvers.solve_two_class
        found = solve(*numbers)
        masks = torch.from_numpy(found.head_mask), torch.from_numpy(found.neuron_mask)
        return [*masks, totals(found, "upper_bound", "lambda_")]

    return RAW.solve_two_class, given, expected


def mask(rng):
    count = rng.choice([0, 1, 12])
    given = {"value": units(rng, count), "cost": units(rng, count)}
    given |= {"budget": rng.choice([0.0, 2.0, 5]), "max_nodes": rng.choice([0, 1000])}

    def expected(given):
        value, cost, budget, nodes = given.values()
        found = solvers.solve_mask(value, cost, float(budget), max_nodes=int(nodes))
        names = "upper_bound", "lambda_", "optimal", "nodes"
        return [torch.from_numpy(found.mask), totals(found, *names)]

    return RAW.solve_mask, given, expected


def refinement(rng):
    layers, heads, neurons = rng.choice([1, 3]), rng.choice([0, 2]), rng.choice([0, 5])
    count = layers * (heads + neurons)
    given = {"value": units(rng, count), "cost": units(rng, count), "budget": rng.choice([1.0, 4])}
    given |= {"mask": units(rng, count) > 0.5, "layers": layers, "heads": heads, "neurons": neurons}
    given |= {"pairs": rng.choice(["same_layer_cross", "all"]), "literal": rng.random() < 0.3}

    def expected(given):
        value, cost, budget, start, layers, heads, neurons, pairs, literal = given.values()
        sizes = [(int(layers), int(heads)), (int(layers), int(neurons))]
        first = sizes[0][0] * sizes[0][1]
        parts = [
            [t[:first].view(sizes[0]).numpy(), t[first:].view(sizes[1]).numpy()]
            for t in (value, cost, start)
        ]
        problem = solvers.Units(*parts[0], *parts[1])
        found = solvers.refine_masks(
            problem, float(budget), *parts[2], pairs=pairs, literal=bool(literal)
        )
        both = [found.head_mask.ravel(), found.neuron_mask.ravel()]
        refined = torch.cat([torch.from_numpy(each) for each in both])
        return [refined, totals(found, "repairs", "adds", "swaps", "converged")]

    return RAW.refine_masks, given, expected


RAW = torch.ops.floe
MAKERS = {
    "solve_two_class": two_class,
    "solve_mask": mask,
    "refine_masks": refinement,
    "moe_lora": public,
    "moe_lora_add": public_add,
    "moe_lora_group": public_group,
    "moe_lora_group_add": public_group_add,
    "moe_lora_forward": raw_forward,
    "moe_lora_backward": raw_backward,
    "moe_lora_experts": experts,
    "moe_lora_experts_backward": experts_backward,
    "keyed_dropout": dropout(floe_triton.keyed_dropout),
    "raw keyed_dropout": dropout(RAW.keyed_dropout),
    "mask_gradients": mask_gradients(ops.mask_gradients),
    "raw mask_gradients": mask_gradients(RAW.mask_gradients),
    "accumulate_fisher_": accumulate(ops.accumulate_fisher_),
    "raw accumulate_fisher_": accumulate(RAW.accumulate_fisher_),
}


def inside_nan(t):
    wide = t.new_full([2 * size + 3 for size in t.shape], torch.nan)
    inner = wide[tuple(slice(1, 2 * size + 1, 2) for size in t.shape)]
    return inner.copy_(t)


def quantized(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def huge(t):
    return t.flatten()[:1].expand(*[1 << 40] * (t.dim() - 1), max(1, t.shape[-1]))


ODD = [  # the same values
    inside_nan,
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    lambda t: torch._neg_view(-t),
    lambda t: torch.stack([t.double(), -t.double()], -1).view(-1)[::2].view(t.shape).to(t.dtype),
    lambda t: (
        torch.view_as_complex(torch.stack([t.double()] * 2, -1)).conj().imag.neg().to(t.dtype)
    ),
    lambda t: t.clone().requires_grad_(),
    lambda t: torch.nn.Parameter(t, requires_grad=False),
    lambda t: t.as_subclass(Subclass),
    lambda t: t[:1].expand(t.shape) if t.dim() and len(t) else t,
    lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t: torch.conj(t),
    lambda t: t.as_strided(t.shape, [0] * t.dim()) if t.numel() else t,
]
WRONG = [
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in (*FLOATS, torch.int64, torch.bool)),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to("meta"),
    lambda t: t[None],
    lambda t: t[0] if t.dim() and len(t) else t[None],
    lambda t: t[1:] if t.dim() else t[None],
    lambda t: t[..., :-1] if t.dim() else t[None, None],
    lambda t: torch.cat([t, t]) if t.dim() else t[None],
    lambda t: t.transpose(0, -1) if t.dim() else t[None],
    lambda t: t.to_sparse(),
    lambda t: t.to_mkldnn(),
    lambda t: t[:2].to_sparse_csr(),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    quantized,
    huge,
    lambda t: None,
    lambda t: [t],
    lambda t: 1.0,
    lambda t: "x",
    lambda t: t.numpy(),
]
NUMBERS = [
    float("nan"),
    float("inf"),
    -1.0,
    0.0,
    1,
    1.0,
    3,
    2**63,
    10**400,
    "1",
    None,
    [],
    1j,
    True,
]
WORDS = ["fused", "gemm", "", "native", "eager", None, 3, "per_expert"]


def changed(rng, value):
    """``value``, odd or wrong; a list has one entry changed, or one too many or too few."""
    if isinstance(value, torch.Tensor):
        try:
            return rng.choice(ODD + WRONG if rng.random() < 0.5 else ODD)(value)
        except (RuntimeError, TypeError, IndexError):  # torch has no such tensor
            return value
    if isinstance(value, list):
        kind = rng.random()
        if value and kind < 0.7:
            at = rng.randrange(len(value))
            return [changed(rng, one) if i == at else one for i, one in enumerate(value)]
        return rng.choice([value[1:], [*value, *value[:1]], [*value, None], None, tuple(value)])
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return rng.choice(WORDS)
    return rng.choice(NUMBERS)


def converted(value, dtype):
    """Plain copies of everything, floats in ``dtype``."""
    if isinstance(value, dict):
        return {name: converted(one, dtype) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [converted(one, dtype) for one in value]
    if not isinstance(value, torch.Tensor) or has_no_values(value):
        return value
    plain = torch.zeros(value.shape, dtype=value.dtype).copy_(value.detach())
    return plain.to(dtype or plain.dtype) if plain.is_floating_point() else plain


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if not isinstance(outputs, (list, tuple)):
        return []
    return [one for each in outputs for one in flat(each)]


def call(op, given):
    """Its outputs, or with what it refused."""
    try:
        return op(**given), None
    except (TypeError, ValueError, RuntimeError) as error:
        return None, error


def is_named(error, name, given):
    text = str(error)
    known = [*given, *(SINGLE[one] for one in given if one in SINGLE), name.split()[-1]]
    return any(one in text for one in known) or "allocate memory" in text or "floe: " in text


def attack(name, seed):
    """One call; returns whether it was accepted."""
    rng = random.Random(seed)
    op, given, expected = MAKERS[name](rng)
    right = rng.random() < 0.1
    for _ in range(0 if right else rng.choice([1, 1, 2])):
        at = rng.choice(list(given))
        given[at] = changed(rng, given[at])
    valued = not has_no_values(without(given, "seed"))  # where nothing drops, none is read
    wide, own = (converted(given, d) if valued else None for d in (torch.float64, None))
    start = time.thread_time()
    outputs, refused = call(op, given)
    assert time.thread_time() - start < 2
    if refused is not None:
        assert not right, refused
        assert is_named(refused, name, given), f"{type(refused).__name__}: {refused}"
        return False
    if wide is None:
        assert all(one.is_meta for one in flat(outputs))
        return True
    if outputs is None:
        outputs = given["fisher"]
    exact, torchs = expected(wide), expected(own)
    for found, torchs_one, exact_one in zip(flat(outputs), torchs, exact, strict=True):
        assert found.device.type == "cpu"
        assert_right(converted(found, None), torchs_one, exact_one.double(), rounding_of(given))
    return True


def rounding_of(given):
    """The coarsest of the floats'."""
    floats = [one for one in flat(list(given.values())) if one.is_floating_point()]
    return max(torch.finfo(one.dtype).eps for one in floats)


def assert_right(found, torchs, exact, rounding):
    """As within the budget of the other tests; of single numbers too, which may cancel out."""
    assert found.shape == exact.shape
    if torchs.isfinite().all() and exact.numel():
        allowed = 4 * relative_error(torchs, exact) + 8 * rounding
        assert relative_error(found, exact) <= allowed


def has_no_values(value):
    if isinstance(value, dict):
        return any(map(has_no_values, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_no_values, value))
    if not isinstance(value, torch.Tensor):
        return False
    return (
        value.is_meta
        or value.is_nested
        or value.layout != torch.strided
        or value.is_quantized
        or value.numel() > 1 << 30
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_calls_are_refused_or_right(name):
    count = -(-trials(CALLS) // len(MAKERS))
    accepted = 0
    for seed in range(count):
        try:
            accepted += attack(name, seed)
        except BaseException as error:
            error.add_note(f"attack({name!r}, {seed})")
            raise
    assert 0 < accepted < count  # both ends of it are tried


def elsewhere(value):
    if isinstance(value, list):
        return [elsewhere(one) for one in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", MAKERS)
def test_no_tensor_may_be_on_another_device(name):
    for seed in range(4):
        op, given, _ = MAKERS[name](random.Random(seed))
        for at in (one for one in given if flat(given[one])):
            _, refused = call(op, {**given, at: elsewhere(given[at])})
            is_read = at != "seed" or given.get("dropout_p") != 0.0 or not inspect.isfunction(op)
            assert is_read <= (refused is not None), at
            assert refused is None or is_named(refused, name, given)


def test_every_op_is_attacked():
    """Also one that is added: its maker is missing here then."""
    registered = {
        schema.name.removeprefix("floe::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("floe::")
    }
    assert registered == {name.split()[-1] for name in MAKERS} & registered
