"""What the stages of a run share: its folder, the base model, the tokenizer, the rows.

Each is opened when first needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file, logging

from floe.adapters import FloeConfig, get_model, remove_adapters
from floe.adapters.files import load_adapter
from floe.artifacts.results import Search
from floe.artifacts.schema import read
from floe.config import DataSource, RunConfig
from floe.data.batches import Collator, TokenRow, make_batches
from floe.data.rows import (
    Encoded,
    encode,
    encode_choices,
    encode_questions,
    rows_of_both,
    sample,
    split,
)
from floe.data.sources import Row, load_rows
from floe.doctor import auto_dtype
from floe.errors import FileError
from floe.machine import memory
from floe.pipeline import identity
from floe.pipeline.run_folder import RunFolder
from floe.progress import Progress
from floe.selection.placement import Placement
from floe.storage import read_json
from floe.training.schedule import TrainSettings
from floe.types import Batch


class RunInputs:
    """One run: its configuration and folder, what it reads, and whom it tells of its progress.

    The base model is shared: adapters go when their user is done.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.progress = config, progress or Progress()
        self.folder = folder or RunFolder(Path(config.output_dir) / config.name)
        self.path = self.folder.path
        self.unused_weights: list[str] = []
        self._encoded: dict[str, Encoded] = {}

    @property
    def size(self) -> tuple[int, int]:
        """Rank and number of experts that the search stage decided on."""
        result = read(Search, self.path / "search/result.json")
        return result.rank, result.num_experts

    @property
    def policies(self) -> set[str]:
        """Of the main arm and all others."""
        return {self.config.select.policy, *(arm.policy for arm in self.config.baselines)}

    @cached_property
    def device(self) -> torch.device:
        """Device of the model: as configured, else the first CUDA device where there is one."""
        wanted = self.config.model.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "model.device must be cpu or auto on this machine, got cuda: "
                "no CUDA device is there"
            )
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and "LOCAL_RANK" in os.environ:  # one of torchrun's workers
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return torch.device(wanted)

    @property
    def device_memory(self) -> int:
        """Bytes of the device's memory, in all."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return int(memory()["total"] or 0)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the base weights."""
        named = self.config.model.dtype
        return auto_dtype(self.device) if named == "auto" else getattr(torch, named)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        path = self.config.model.path
        with _reading(path, "cannot be loaded as a tokenizer"):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **self._source)

    @cached_property
    def base_model(self) -> nn.Module:
        """The frozen base model, in eval mode on the run's device."""
        named = self.config.model
        model, self.unused_weights = load_base(
            named.path, dtype=self.dtype, attention=named.attention, **self._source
        )
        model.config.use_cache = False
        base: nn.Module = model.to(self.device).eval().requires_grad_(False)
        return base

    @cached_property
    def structure(self) -> Any:
        """The base model without values, on the meta device; the weights' names are checked.

        Only where they lie in a folder as they are: a hub model's may not be here yet, and GGUF and
        quantised ones are known when they are loaded.
        """
        named, source = self.config.model, self._source
        model = structure(named.path, attention=named.attention, **source)
        quantised = getattr(model.config, "quantization_config", None) is not None
        if Path(named.path).is_dir() and named.gguf_file is None and not quantised:
            model, self.unused_weights = load_base(
                named.path, dtype=self.dtype, attention=named.attention, device="meta", **source
            )
        return model

    @property
    def _source(self) -> dict[str, str]:
        """Which files of ``model.path`` are meant, as transformers names it."""
        model = self.config.model
        source = {"revision": model.revision or "main"}
        return source if model.gguf_file is None else source | {"gguf_file": model.gguf_file}

    @cached_property
    def _split_rows(self) -> tuple[list[TokenRow], list[TokenRow]]:
        data = self.config.data
        rows = self.encoded("train").rows
        if data.validation is not None:
            return rows, self.encoded("validation").rows
        return split(rows, data.val_fraction, data.seed)

    @property
    def train_rows(self) -> list[TokenRow]:
        """Rows to train on, without those held out for validation."""
        return self._split_rows[0]

    @property
    def validation_rows(self) -> list[TokenRow]:
        """Rows the search and the validation loss use."""
        return self._split_rows[1]

    @cached_property
    def warmup_rows(self) -> list[TokenRow]:
        """The warm-up's share of the training rows."""
        count = max(1, round(len(self.train_rows) * self.config.warmup.fraction))
        return sample(self.train_rows, count, self.config.warmup.seed)

    @cached_property
    def calibration_rows(self) -> list[TokenRow]:
        """Warm-up rows the Fisher information is measured on."""
        return sample(self.warmup_rows, self.config.score.rows, self.config.score.seed)

    @cached_property
    def statistic_rows(self) -> list[TokenRow]:
        """Calibration rows the layer statistics are measured on."""
        settings = self.config.score
        return sample(self.calibration_rows, settings.statistic_rows, settings.seed)

    @cached_property
    def taylor_rows(self) -> list[TokenRow]:
        """Rows of the Taylor cost: general text where given, else some of the calibration's."""
        settings = self.config.score
        if settings.taylor_data is None:
            return sample(self.calibration_rows, settings.taylor_rows, settings.seed)
        return sample(self.encoded("taylor").rows, settings.taylor_rows, settings.seed)

    @cached_property
    def _test(self) -> tuple[list[Row], str, Encoded, list[TokenRow]]:
        """Test rows as text, what counts as accuracy, and the rows that every figure is made of."""
        data, settings = self.config.data, self.config.eval
        source = data.test or data.validation
        if source is None:
            rows, numbers = self.read(data.train), [row.index for row in self.validation_rows]
        else:
            rows = self.read(source)
            numbers = list(range(len(rows)))
        chosen = {number: rows[number] for number in numbers[: settings.limit]}
        kind = settings.accuracy
        if kind == "auto":
            kind = "choices" if all("choices" in row for row in chosen.values()) else "generation"
        common: dict[str, Any] = {
            "template": data.template,
            "max_length": data.max_length,
            "source": "data.test",
        }
        encoded = other = encode(chosen, self.tokenizer, **common)
        if kind == "choices":
            other = encode_choices(chosen, self.tokenizer, **common)
        elif kind == "generation":
            most = settings.max_new_tokens
            other = encode_questions(chosen, self.tokenizer, max_new_tokens=most, **common)
        encoded = rows_of_both(encoded, other, data.max_length, "data.test")
        return [chosen[row.index] for row in encoded.rows], kind, encoded, other.rows

    @property
    def test_examples(self) -> list[Row]:
        """Test rows as text, those of ``test_rows``; of the validation data where none is named."""
        return self._test[0]

    @property
    def test_rows(self) -> list[TokenRow]:
        """Test rows as tokens; one that cannot be used for loss and accuracy is in neither."""
        return self._test[2].rows

    @property
    def accuracy(self) -> str:
        """How answers are measured: ``choices``, ``generation`` or ``none``."""
        return self._test[1]

    @property
    def answer_rows(self) -> list[TokenRow]:
        """Test rows as tokens in the way that accuracy reads them: every choice, or the prompt."""
        return self._test[3]

    def encoded(self, part: str) -> Encoded:
        """Rows of a part of the data (see PARTS) as tokens, and which were dropped, why."""
        if part == "test":
            return self._test[2]
        if part not in self._encoded:
            source, data = self.source(part), self.config.data
            assert source is not None
            self._encoded[part] = encode(
                self.read(source),
                self.tokenizer,
                template=data.template,
                max_length=data.max_length,
                source=PARTS[part],
            )
        return self._encoded[part]

    def source(self, part: str) -> DataSource | None:
        """Where a part of the data comes from; None where the configuration names none."""
        data, taylor = self.config.data, self.config.score.taylor_data
        sources = {"train": data.train, "validation": data.validation, "test": data.test}
        return taylor if part == "taylor" else sources[part]

    def read(self, source: DataSource) -> list[Row]:
        """Rows of a source as text."""
        columns = {k: v for k, v in self.config.data.columns.model_dump().items() if v is not None}
        hub: dict[str, Any] = {}
        if source.path is None:
            hub = {"split": source.split, "revision": source.revision, "subset": source.name}
        return load_rows(source.path or str(source.hub), columns=columns, limit=source.limit, **hub)

    def batches(self, rows: list[TokenRow], batch_size: int) -> list[Batch]:
        """Batches for measuring: longest rows first, on the model's own collator."""
        collator = Collator.for_model(self.base_model, self.tokenizer.pad_token_id or 0)
        return make_batches(rows, batch_size, collator)

    def settings(self, max_steps: int | None = None) -> TrainSettings:
        """The training's settings; ``max_steps`` replaces the configuration's."""
        values = self.config.train.model_dump()
        points = values.pop("validations")
        values["validation_points"] = tuple((i + 1) / points for i in range(points))
        values["eval_batch_size"] = self.config.eval.batch_size
        if max_steps is not None:
            values["max_steps"] = max_steps
        return TrainSettings(**values)

    def adapter_config(
        self, rank: int, experts: int, placement: Placement | None = None
    ) -> FloeConfig:
        """The adapter's settings at this size, where the placement says so (None = all layers)."""
        adapter = self.config.adapter.model_dump()
        adapter |= {"r": rank, "num_experts": experts}
        if placement is not None:
            adapter |= placement.patterns
            if placement.modules:  # they name their targets themselves
                del adapter["target_modules"]
        named, seed = self.config.model, self.config.train.seed
        adapter |= {"base_model_name_or_path": named.path, "revision": named.revision}
        return FloeConfig(**adapter, seed=seed)

    def fresh(self, rank: int, experts: int, placement: Placement | None = None) -> Any:
        """The base model with fresh adapters."""
        return get_model(self.base_model, self.adapter_config(rank, experts, placement))

    @contextmanager
    def adapted(self, folder: Path) -> Iterator[Any]:
        """The base model with the adapter saved in ``folder``; afterwards without it again."""
        model = load_adapter(self.base_model, folder)
        try:
            yield model
        finally:
            remove_adapters(model)

    @cached_property
    def model_digests(self) -> dict[str, dict[str, Any]]:
        """sha256 of the base model's files by kind; see :func:`identity.model_digests`."""
        return identity.model_digests(self)

    @cached_property
    def commit(self) -> str:
        """The commit of a hub model, which names all its files."""
        model = self.config.model
        wanted = model.gguf_file or "config.json"
        with _reading(model.path, "cannot be loaded as a model"):
            file = cached_file(model.path, wanted, revision=model.revision or "main")
        return Path(file).parents[wanted.count("/")].name


PARTS = {part: f"data.{part}" for part in ("train", "validation", "test")}
PARTS["taylor"] = "score.taylor_data"
"""Parts of the data, and the settings that name them."""


def load_base(
    name: str,
    *,
    dtype: torch.dtype,
    attention: str | None,
    device: str | None = None,
    **source: Any,
) -> tuple[Any, list[str]]:
    """A causal language model as transformers loads it, and names of weights it has no use for.

    Raises:
        FileError: it cannot be loaded, is an adapter or an encoder-decoder, or its files lack
            weights of the model, which transformers would draw at random.
    """
    if "gguf_file" in source:  # it takes seconds to read, and holds no encoder
        _refuse_no_base(name, source["revision"])
    else:
        _configuration(name, **source)
    settings: dict[str, Any] = source | ({} if device is None else {"device_map": device})
    if attention is not None:
        settings["attn_implementation"] = attention
    with _reading(name, _unloadable(attention)):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **settings,
        )
    for tensor, saved, wanted in sorted(info["mismatched_keys"]):
        raise FileError(
            name, f"{tensor} must be {list(wanted)} as config.json says, got {list(saved)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise FileError(
            name,
            f"must hold every weight, {len(missing)} are missing: {', '.join(missing[:3])}; they "
            "would be random numbers: config.json must describe the weights, their number of "
            "layers for example",
        )
    return model, sorted(info["unexpected_keys"])


def structure(name: str, *, attention: str | None = None, **source: Any) -> nn.Module:
    """A causal language model without weights, on the meta device, from its configuration alone.

    Raises:
        FileError: there is none in this folder or of this hub name.
    """
    config = _configuration(name, **source)
    settings = {} if attention is None else {"attn_implementation": attention}
    with _reading(name, _unloadable(attention)), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, **settings
        )
    return model


def _unloadable(attention: str | None) -> str:
    how = f" with model.attention: {attention}" if attention else ""
    return f"cannot be loaded as a model{how}"


def _configuration(name: str, **source: Any) -> Any:
    """The model's configuration, if a base model is there."""
    _refuse_no_base(name, source.get("revision"))
    with _reading(name, "cannot be read as a model's configuration"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
    if getattr(config, "is_encoder_decoder", False):
        raise FileError(
            name, f"must be a causal language model, got the encoder-decoder {config.model_type}"
        )
    return config


def _refuse_no_base(name: str, revision: str | None) -> None:
    """transformers would load an adapter's base, with the adapter on top or without it."""
    if not Path(name).exists() and (Path(name).is_absolute() or name.startswith((".", "~"))):
        raise FileError(name, "does not exist")
    with _reading(name, "cannot be loaded as a model"):
        file = find_adapter_config_file(name, revision=revision)
    if file is not None:
        adapter = read_json(Path(file))
        kind, base = adapter.get("peft_type"), adapter.get("base_model_name_or_path")
        raise FileError(
            name,
            f"holds an adapter ({kind}), no base model: name its base, {base!r}; a LoRA can be "
            "merged into it first (peft's merge_and_unload), in a folder of its own",
        )


@contextmanager
def _reading(path: str, problem: str) -> Iterator[None]:
    """A FileError for whatever a library raises while it reads a model's files.

    Libraries promise no types: tokenizers raise Exception itself, weights their own errors, a
    missing package ImportError, a config of odd values AttributeError or TypeError.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in reason:
            reason = "it needs Python code of its own, and floe runs no code of a model"
        raise FileError(path, f"{problem}: {reason}") from error


def calm_libraries() -> None:
    """Switch off the progress bars of transformers; floe shows progress itself."""
    logging.disable_progress_bar()
