"""A run, described: every setting of ``floe run`` as typed models. Unknown keys are errors.

Defaults are those of the FLoE paper (Table 6) and of the launch scripts it builds on; where the
paper is silent the choice is the module's named default. ``floe schema`` prints all of it as JSON
schema. How the models are read from YAML is in ``config_file``.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import quote

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from floe.errors import shown
from floe.selection.policies import POLICIES

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**31)]  # 0 = without
Range = tuple[Count, Count, Count]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy, torch and transformers all take
Sweep = Annotated[list[Count], Field(min_length=2)]
Schedule = Literal["lisa", "alast"]
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _policy_name(name: Any, others: tuple[str, ...] = ()) -> str:
    """``name`` where it is a registered policy's, or one of ``others``."""
    known = [*POLICIES, *others]
    if name not in known:
        expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise PydanticCustomError("literal_error", "Input should be {names}", {"names": expected})
    return str(name)


Policy = Annotated[
    str,
    PlainValidator(_policy_name),
    WithJsonSchema({"enum": [*POLICIES], "type": "string"}),
]
PolicyOrSchedule = Annotated[
    str,
    PlainValidator(partial(_policy_name, others=get_args(Schedule))),
    WithJsonSchema({"enum": [*POLICIES, *get_args(Schedule)], "type": "string"}),
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, data: Any) -> Any:
        """YAML's yes and on are true, and pydantic would take true for 1."""
        for name, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(name)
            values = value if isinstance(value, list) else [value]
            flag = any(isinstance(part, bool) for part in values[:100])
            if flag and field is not None and field.annotation not in (bool, bool | None):
                raise ValueError(f"{name} must not be true or false, got {shown(value)}")
        return data


class ModelConfig(_Section):
    """The base model."""

    path: str = Field(description="Hub name or folder of a causal language model.")
    revision: str | None = None
    gguf_file: str | None = Field(
        None, description="File inside `path` when the weights are GGUF; dequantised."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="auto: bfloat16 where the machine has fast bfloat16 products, else float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: str | None = Field(
        None, description="attn_implementation of transformers; None = its choice."
    )


class DataSource(_Section):
    """One table of rows: a local JSONL, CSV or parquet file, or a data set on the hub."""

    path: str | None = None
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: Count | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                "give exactly one of path and hub, "
                f"got path={shown(self.path)} and hub={shown(self.hub)}"
            )
        return self


class Columns(_Section):
    """Which column is what. Nothing is guessed: a column that is not there is an error."""

    prompt: str = "prompt"
    completion: str = "completion"
    choices: str | None = None
    answer: str | None = None
    task: str | None = None


class DataConfig(_Section):
    """Rows to train on, to choose on and to test on."""

    train: DataSource
    validation: DataSource | None = Field(
        None, description="None: val_fraction of the training rows."
    )
    test: DataSource | None = None
    columns: Columns = Columns()
    template: str | None = Field(
        None, description="None: prompt + completion; 'chat': the tokenizer's template."
    )
    max_length: Count = 1024
    max_dropped: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = Field(
        0.5,
        description="Share of a file's rows that may be dropped; beyond it the run stops. Where "
        "most rows are lost, the result is about other data than the file's.",
    )
    val_fraction: Fraction = 0.05
    seed: Seed = 41


class AdapterConfig(_Section):
    """The adapter when no search decides rank and experts, and all its other settings."""

    r: Count = 8
    num_experts: Count = 4
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: list[str] | None = Field(
        None, description="Projections of a block; none named: its feed-forward (Table 6)."
    )
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="Experts that a token uses, those of the largest router logits; 0: all."
    )
    temperature: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = Field(
        1.0, description="Divides the router's logits."
    )
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    share_input: bool = Field(
        True, description="q/k/v and gate/up as one op, with one dropout mask."
    )
    backend: Literal["auto", "eager", "native", "gemm", "fused"] = "auto"


class TrainConfig(_Section):
    """One training: Table 6, with its ancestors' cosine schedule and accumulation of 8."""

    learning_rate: Positive = 2e-4
    batch_size: Count = 1
    grad_accum: Count = 8
    epochs: Positive = 1.0
    max_steps: Count | None = None
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Positive = 1.0
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    validations: CountOrNone = Field(4, description="How often to measure validation loss.")
    save_steps: Count = 50
    seed: Seed = 41


class WarmupConfig(_Section):
    """The full-layer training whose model is scored; with a search, every trial is one."""

    fraction: Fraction = Field(0.5, description="Share of the training rows (FLoE section 4.1).")
    max_steps: Count | None = None
    seed: Seed = 41


class SearchConfig(_Section):
    """Rank and expert search on validation loss; `trials: 0` skips it: warm-up uses `adapter`."""

    trials: CountOrNone = 30
    rank: Range = Field((2, 32, 2), description="low, high, step")
    num_experts: Range = Field((2, 4, 1), description="low, high, step")
    sampler: Literal["tpe", "paper", "random", "grid"] = "tpe"
    startup_trials: Count = 10
    prune: bool = False
    storage: str | None = Field(
        None,
        repr=False,
        description="Optuna storage URL; None: SQLite in the run folder. ${NAME} is read from the "
        "environment when the database is opened: the whole URL, or a part (then percent-encoded). "
        "A password that stands here is masked in what a run writes.",
    )
    seed: Seed = 41

    @model_validator(mode="after")
    def _ordered_ranges(self) -> SearchConfig:
        for name, (low, high, _) in (("rank", self.rank), ("num_experts", self.num_experts)):
            if low > high:
                raise ValueError(
                    f"{name} must be [low, high, step] with low <= high, got {[low, high]}"
                )
        return self


class ScoreConfig(_Section):
    """Fisher information on the warm-up model, Taylor cost on the base model."""

    rows: Count = 512
    batch_size: Count = Field(
        8, description="Of the mask tuning; the scores do not depend on it, they group rows."
    )
    keep_samples: bool = Field(
        False, description="Keep every row's mask gradients: for block Fisher and bootstraps."
    )
    first_order: bool = Field(False, description="Also keep the first-order term of Eq. 6.")
    reduction: Literal["sample", "batch"] = "sample"
    mask_scope: Literal["base", "full"] = Field(
        "base", description="Mask the frozen path alone (Eq. 2), or the adapter's, too."
    )
    taylor_rows: Count = 32
    taylor_kind: Literal["element", "vector"] = "element"
    taylor_aggregate: Literal["abs_of_mean", "mean_of_abs"] = "abs_of_mean"
    taylor_tokens: Literal["all", "response"] = Field("all", description="Those with a loss.")
    taylor_data: DataSource | None = Field(
        None, description="General text; None: the first warm-up rows."
    )
    statistic_rows: Count = Field(
        32, description="Calibration rows of the layer statistics some policies need."
    )
    seed: Seed = 41


class _Choice(_Section):
    """How an arm comes to its layers, and what their parameters are spent on."""

    policy: str
    preset: Literal["global", "exact", "paper_layer", "alg1_literal"] = "global"
    pick: Literal["top", "bottom"] = Field(
        "top", description="bottom: the reversed ranking, an ablation."
    )
    choose: Literal["layers", "modules", "sizes"] = Field(
        "layers",
        description="What the chosen layers' parameters are spent on: whole `layers`; single "
        "`modules` (projections); or `sizes`, rank and experts of every layer from the search's "
        "ranges.",
    )
    seed: Seed = 42

    @model_validator(mode="after")
    def _projections_have_scores(self) -> Self:
        known = tuple(name for name, rule in POLICIES.items() if rule.modules is not None)
        if self.choose == "modules" and self.policy not in known:
            raise ValueError(
                f"choose: modules needs a policy that scores projections, {known}, got "
                f"{self.policy!r}"
            )
        if self.choose != "layers" and self.policy in ("all", *get_args(Schedule)):
            raise ValueError(f"policy {self.policy!r} adapts all layers: choose must be layers")
        return self


class SelectConfig(_Choice):
    """Which layers get adapters. The paper's masks are computed and stored whatever decides."""

    policy: Policy = "adapter_fisher"
    first_order: bool = Field(
        False, description="Value units with the first-order term; needs score.first_order."
    )
    budget: Fraction = Field(0.5, description="Share of the Taylor mass the masks retain.")
    layers: (
        Count | Fraction | dict[Literal["params", "memory"], Count] | dict[Literal["sweep"], Sweep]
    ) = Field(
        0.25,
        description="A count, a fraction, {params: the adapter's parameter budget}, {memory: bytes "
        "that training the adapters may take beyond the frozen model}, or {sweep: [8, 12, 16]}: "
        "counts that are trained and compared on the validation rows.",
    )
    r0: Positive | None = Field(
        None,
        description="Of choose: sizes: the rank of one expert that reaches 63 % of a layer's gain; "
        "None: fitted to the search's trials.",
    )
    score: Literal["soft", "sparsity", "path"] = Field(
        "soft",
        description="Of a layer's masks: what they take away, the share of masked units, or that "
        "share over budget_path.",
    )
    budget_path: list[Fraction] = Field(
        [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], description="Budgets that `score: path` averages over."
    )
    tune: bool | None = Field(
        None,
        description="Tune the paper's masks: null where the model's can be (not on quantised "
        "weights, nor with a residual multiplier); true: they must be; false: never.",
    )
    tune_tokens: Count = 2048


class Baseline(_Choice):
    """One more arm trained like the main one, on other layers."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    policy: PolicyOrSchedule = Field(
        description="A rule for layers, or a schedule that moves them during the training."
    )
    interval: Count = Field(20, description="Steps between the choices of a schedule.")


class EvalConfig(_Section):
    """What is measured on the test rows (the validation rows when there are none)."""

    batch_size: Count = 16
    accuracy: Literal["auto", "choices", "generation", "none"] = "auto"
    choice_score: Literal["mean", "sum"] = Field(
        "mean", description="Per-token or total log-likelihood."
    )
    max_new_tokens: Count = 32
    limit: Count | None = None
    seed: Seed = 41


class ProfileConfig(_Section):
    """Step time and memory against the number of adapted layers (Fig. 1b); `steps: 0` skips it."""

    steps: CountOrNone = 3
    points: Annotated[int, Field(ge=2, lt=2**31)] = 4


class RunConfig(_Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    output_dir: str = Field("runs", description="Folder of runs; this one's is output_dir/name.")
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    warmup: WarmupConfig = WarmupConfig()
    search: SearchConfig = SearchConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    train: TrainConfig = TrainConfig()
    baselines: list[Baseline] = []
    eval: EvalConfig = EvalConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _distinct_arms(self) -> RunConfig:
        names = [baseline.name for baseline in self.baselines]
        clash = sorted({n for n in names if names.count(n) > 1 or n in ("main", "base")})
        if clash:
            raise ValueError(f"baseline names must differ and not be 'main' or 'base', got {clash}")
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> RunConfig:
        searched = self.search.num_experts[0] if self.search.trials else self.adapter.num_experts
        if self.adapter.top_k > searched:
            raise ValueError(
                f"adapter.top_k must be at most the fewest experts of an adapter, {searched}, "
                f"got {self.adapter.top_k}"
            )
        return self

    @model_validator(mode="after")
    def _gain_is_known(self) -> RunConfig:
        kinds = {self.select.choose, *(baseline.choose for baseline in self.baselines)}
        if "sizes" in kinds and self.select.r0 is None and self.search.trials < 3:
            raise ValueError(
                "choose: sizes needs select.r0, or at least 3 search.trials to fit it to, "
                f"got {self.search.trials}"
            )
        return self


def storage_url(search: SearchConfig) -> str | None:
    """The storage with ``${NAME}`` taken from the environment: for the one who opens it alone.

    Raises:
        ValueError: a variable that is not set, or a password that was masked.
    """
    url = search.storage
    if url is None:
        return None
    if ":***@" in url:
        raise ValueError(
            "search.storage must hold its password, got one that was masked when the "
            "configuration was written; give it as ${NAME}, from the environment"
        )

    def value(named: re.Match[str]) -> str:
        if named[1] not in os.environ:
            raise ValueError(f"search.storage needs the environment variable {named[1]}: not set")
        text = os.environ[named[1]]
        return text if named[0] == url else quote(text, safe="")

    return _VARIABLE.sub(value, url)
