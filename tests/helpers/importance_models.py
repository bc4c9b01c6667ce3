"""Tiny random models of every known layout, adapted or plain, and batches of uneven rows."""

import torch
import transformers as hf

from floe.adapters import FloeConfig, adapted_modules, get_model
from floe.data.batches import rows_of
from floe.importance.chunk_store import Workbook
from floe.importance.fisher import FisherPlan
from floe.importance.taylor import TaylorPlan

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {"attention_bias": True}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {}),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {"head_dim": 12}),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {"head_dim": 12}),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {}),
}
TARGETS = {"phi3": ["gate_up_proj", "down_proj"]}


def plain(kind="llama", dtype=torch.float32, **overrides):
    config_type, model_type, extra = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_type(config_type(**(SIZES | extra | overrides)))
        for name, p in model.named_parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.05)
    return model.to(dtype)


def adapted(kind="llama", dtype=torch.float32, targets=None, **config):
    targets = targets or TARGETS.get(kind)
    adapter_dtype = {torch.bfloat16: "bfloat16"}.get(dtype, "float32")
    model = get_model(
        plain(kind, dtype),
        FloeConfig(
            r=3,
            num_experts=2,
            dropout=0.25,
            target_modules=targets,
            adapter_dtype=adapter_dtype,
            **config,
        ),
    )
    generator = torch.Generator().manual_seed(5)
    for module in adapted_modules(model).values():
        expand = module.floe_expand["default"].weight
        expand.data.copy_(torch.randn(expand.shape, generator=generator) * 0.05)
        if dtype == torch.float64:
            module.floe_shrink["default"].weight.data = module.floe_shrink[
                "default"
            ].weight.data.double()
            expand.data = expand.data.double()
    return model.train()


def batches(lengths=((9, 4), (5, 2), (7, 3), (3, 1), (8, 5)), size=None, side="left", keep=False):
    """One row per (tokens, response tokens), in batches of ``size``, padded on ``side``."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 61, (n,), generator=generator) for n, _ in lengths]
    size = size or len(rows)
    return [
        _batch(rows[i : i + size], [k for _, k in lengths[i : i + size]], side, keep)
        for i in range(0, len(rows), size)
    ]


def _batch(rows, responses, side, keep):
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for s, (row, response) in enumerate(zip(rows, responses, strict=True)):
        start = width - len(row) if side == "left" else 0
        ids[s, start : start + len(row)] = row
        mask[s, start : start + len(row)] = 1
        labels[s, start + len(row) - response : start + len(row)] = row[len(row) - response :]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    if keep:
        kept = min(width, 1 + max(responses))
        batch |= {"labels": labels[:, -kept:], "logits_to_keep": torch.arange(width - kept, width)}
    return batch


def snapshot(model):
    """Everything scoring must leave alone: values, flags, modes, hooks, gradients."""
    return (
        {n: p.detach().clone() for n, p in model.named_parameters()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        {n: p.grad is None for n, p in model.named_parameters()},
    )


def assert_untouched(model, before):
    values, *flags = snapshot(model)
    assert flags == list(before[1:])
    assert all(torch.equal(values[name], value) for name, value in before[0].items())


class Codes(torch.nn.Linear):
    """A linear whose weight is stored as integers, as quantised layers do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def mean_nll(model, row):
    inputs = {k: v for k, v in row.items() if k != "labels"}
    logp = torch.log_softmax(model(**inputs).logits[0, :-1].double(), -1)
    targets = row["labels"][0, 1:]
    wanted = targets != -100
    return -logp[wanted].gather(1, targets[wanted][:, None]).mean()


def measure(plan, progress=None):
    """The plan's result, by one worker and in memory."""
    book = Workbook(None, {})
    plan.work(book, progress)
    return plan.result(book)


def measure_fisher(model, given, progress=None, **options):
    """Fisher information of the rows of these batches; options are FisherPlan's."""
    return measure(FisherPlan(model, rows_of(given), **options), progress)


def measure_taylor(model, given, progress=None, **options):
    """Taylor cost of the rows of these batches; options are TaylorPlan's."""
    return measure(TaylorPlan(model, rows_of(given), **options), progress)
