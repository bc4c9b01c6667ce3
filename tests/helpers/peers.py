"""floe under other programs' models and trainers, in a process of its own: they load slowly.

``python peers.py WHAT...`` prints what it found as JSON; test_peers.py says what is right.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import floe
from floe.adapters import adapted_modules
from helpers.importance_models import plain
from helpers.small_adapters import trained
from helpers.tiny import tiny_tokenizer

IDS = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
CONFIG = {"r": 2, "num_experts": 2, "dropout": 0.0}


def model():
    return plain(hidden_size=64, intermediate_size=128)


def dequantised(quantised):
    """A plain model of the values that a quantised one computes with."""
    copied = model()
    for path, module in quantised.named_modules():
        if isinstance(module, nn.Linear):
            eye = torch.eye(module.in_features)
            bias = 0 if module.bias is None else module.bias
            weight = (module(eye) - bias).T
            copied.get_submodule(path).weight.data = weight.detach().float()
    return copied.eval()


def quantised_base(base):
    """Values and gradients beside the dequantised reference, then the rest of the way."""
    reference = dequantised(base)
    found, grads = {}, []
    for one in (base, reference):
        adapted = trained(floe.get_model(one, floe.FloeConfig(**CONFIG)))
        adapted.train()
        output = adapted(**BATCH)
        output.loss.backward()
        grads.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
        found.setdefault("logits", []).append(output.logits.detach())
    a, b = found.pop("logits")
    found["logits"] = float((a - b).norm() / b.norm())
    found["gradients"] = max(
        float((grads[0][n] - g).norm() / (g.norm() + 1e-9)) for n, g in grads[1].items()
    )
    del adapted, output
    adapted = trained(floe.get_model(base, floe.FloeConfig(**CONFIG)))
    scores = floe.score(adapted, [BATCH])
    selection = floe.select(scores, adapted, [BATCH], layers=2)
    found["layers"], found["tuned"] = list(selection.layers), selection.tuned
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        floe.save_adapter(adapted, f"{folder}/a")
        expected = adapted(IDS).logits
        floe.adapters.remove_adapters(adapted)
        again = floe.load_adapter(base, f"{folder}/a")
        found["loaded"] = bool(torch.equal(again(IDS).logits, expected))
    return found


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = model()
    quantize_(base, Int8WeightOnlyConfig())
    return quantised_base(base)


def bitsandbytes():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as folder:
        model().save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    return quantised_base(base)


def trl():
    """Losses of DPO from a trained adapter at rate 0, and whether SFT takes added tokens."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
    )
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        adapted = trained(floe.get_model(LlamaForCausalLM(shape), floe.FloeConfig(**CONFIG)))
        pairs = [{"prompt": f"a{i}", "chosen": " yes", "rejected": " no"} for i in range(8)]
        trainer = DPOTrainer(
            model=adapted,
            processing_class=tokenizer,
            args=DPOConfig(
                output_dir=folder,
                max_steps=2,
                learning_rate=0.0,
                logging_steps=1,
                per_device_train_batch_size=4,
                **quiet,
            ),
            train_dataset=datasets.Dataset.from_list(pairs),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        more = tiny_tokenizer()
        more.add_special_tokens({"additional_special_tokens": ["<new>"]})
        more.save_pretrained(Path(folder) / "more")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        trainer = SFTTrainer(
            model=LlamaForCausalLM(shape),
            processing_class=tokenizer,
            args=SFTConfig(
                output_dir=folder,
                max_steps=1,
                save_steps=1,
                chat_template_path=str(Path(folder) / "more"),
                **quiet,
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": turns}] * 8),
            peft_config=floe.FloeConfig(**CONFIG),
        )
        trainer.train()
        saved = floe.FloeConfig.from_pretrained(f"{folder}/checkpoint-1")
    wrapped = sorted({name.rpartition(".")[2] for name in adapted_modules(trainer.model)})
    return {
        "losses": losses,
        "tokens": saved.trainable_token_indices,
        "modules": saved.modules_to_save,
        "adapted": wrapped,
    }


if __name__ == "__main__":
    print("FOUND", json.dumps({what: globals()[what]() for what in sys.argv[1:]}))
