"""The YAML recipe: what decides the bytes of a run, checked by pydantic before any work. (`cluster`, `plan` do not.)"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from quantkit import foreign
from quantkit.errors import QuantkitError, one_line, raise_all

EngineName = Literal["native", "autoawq", "autogptq", "gptqmodel", "llmcompressor", "autoround"]
Method = Literal["gptq", "awq", "awq+gptq", "gptaq", "autoround"]  # which of them, each engine says for itself
ModelT = TypeVar("ModelT", bound=BaseModel)
FormatName = Literal["compressed-tensors", "gptq", "awq"]


def parse_fraction(value: object) -> object:
    """`15%` or `0.15` as a fraction; anything else is left for pydantic to refuse."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            return value
    return value


def spell_no(value: object) -> object:
    """`no` of YAML is a truth value."""
    return "no" if value is False else value


def cluster_address(text: str) -> str:
    """`ray://HOST:PORT`, `HOST:PORT` or `auto`, as Ray itself takes it.

    Raises:
        ValueError: it is none of them.
    """
    if text == "auto":
        return text
    scheme, _, address = text.rpartition("://")
    host, _, port = address.rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise ValueError(f"{text!r}: write it as ray://HOST:PORT, the address that `ray start --head` printed")
    return address


def _group_size(value: int) -> int:
    if value != -1 and value < 8:
        raise ValueError(f"group_size {value} is too small: use -1 (per channel), 32, 64 or 128")
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]  # -1: one group a row
Fraction = Annotated[PositiveFloat, BeforeValidator(parse_fraction)]


class Section(BaseModel):
    """A part of a recipe: frozen, and every unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(Section):
    """Which sources, in windows of how many tokens."""

    text: tuple[str, ...] = Field(min_length=1)
    length: Annotated[int, Field(ge=16)] = 2048


class TextWindows(Text):
    """Windows of text: how many samples."""

    samples: PositiveInt = 128


class Override(Section):
    """A scheme for the linears whose full name matches; what is not given is as everywhere else."""

    match: str  # a shell glob, or a regular expression behind "re:"
    bits: Literal[4, 8] | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None


class Quantize(Section):
    """4-bit weights: engine, effort and method choose the integers, the format stores them."""

    engine: EngineName = "native"
    engine_options: dict[str, bool | int | float | str] = {}  # of engines other than native: iters for autoround
    effort: Literal["fast", "default", "high"] = "default"
    method: Method | None = None  # the effort's, or the engine's first
    drift_correction: Annotated[float, Field(ge=0, le=1)] | None = None  # the effort's
    output_curvature: bool | None = None  # the effort's
    continuations: Annotated[int, Field(ge=0)] | None = None  # the effort's; written by the model, for each window
    rounds: Annotated[int, Field(ge=0)] | None = None  # the effort's; of coordinate descent after GPTQ
    format: FormatName | None = None  # the engine's: compressed-tensors for the native one
    bits: Literal[4, 8, "auto"] = 4
    average_bits: Annotated[float, Field(ge=4, le=16)] | None = None  # with bits auto
    bit_choices: tuple[Literal[4, 8, 16], ...] | None = None  # with bits auto; else all that the format stores
    group_size: GroupSize = 128
    symmetric: bool = False
    act_order: bool = True
    damping: PositiveFloat = 0.01
    ignore: tuple[str, ...] = ()  # patterns of linears left in 16 bits
    overrides: tuple[Override, ...] = ()
    kv_cache: Annotated[Literal["no", "fp8"], BeforeValidator(spell_no)] = "no"  # whether it brings scales for one
    kv_scales: Literal["max", "percentile", "mse"] = "mse"  # how they are chosen
    kv_strategy: Literal["tensor", "attn_head"] = "tensor"  # one a layer, or one a key-value head
    uncalibrated_kv_cache: bool = False  # an FP8 cache although the format takes no scales: it runs at 1.0

    @model_validator(mode="after")
    def _scales_that_are_loaded(self) -> "Quantize":
        bare = self.format in ("awq", "gptq") or self.engine != "native"
        if self.kv_cache == "fp8" and bare and not self.uncalibrated_kv_cache:
            who = f"format {self.format}" if self.format in ("awq", "gptq") else f"engine {self.engine}"
            raise ValueError(
                f"kv_cache fp8 with {who}: vLLM reads KV scales of compressed-tensors that the native engine writes, "
                "drops those of awq and gptq without a word, and serves at 1.0: choose engine native and format "
                "compressed-tensors, or uncalibrated_kv_cache true to have it at 1.0"
            )
        if self.uncalibrated_kv_cache and not (self.kv_cache == "fp8" and bare):
            raise ValueError("uncalibrated_kv_cache is for kv_cache fp8 where no scales are written: leave it out")
        return self

    @model_validator(mode="after")
    def _auto(self) -> "Quantize":
        if (self.bits == "auto") != (self.average_bits is not None):
            raise ValueError("bits auto and average_bits go together: bits auto, average_bits 5 for example")
        if self.bit_choices is not None:
            if self.bits != "auto":
                raise ValueError("bit_choices is for bits auto: leave it out, or set bits auto and average_bits")
            if 4 not in self.bit_choices or len(set(self.bit_choices)) < 2:
                raise ValueError("bit_choices is 4 and what some linears get instead: 4, 16 for example")
        return self

    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None  # by the calibration tokens an input


Temperature = Annotated[float, Field(ge=0, le=2)]


# What only a draft model has; a head (kind eagle3) takes none of it.
_OF_DRAFT_MODELS = (
    "init", "keep_layers", "layer_choice", "fit", "loss", "top_k", "on_policy", "patience", "quantize",
)  # fmt: skip


class Draft(Section):
    """The draft: of which kind, where it starts from, what it learns from, for how long."""

    kind: Literal["draft_model", "eagle3"] = "draft_model"  # eagle3: a head on the target's states, by speculators
    init: str | None = None  # a smaller checkpoint of the family
    keep_layers: PositiveInt | None = None  # or a subset of the target's own layers
    prompts: str = "self:400"
    layer_choice: Literal["fit", "evenly"] = "fit"  # which of the target's layers are kept: those that stand for most
    fit: bool = True  # whether the kept layers are fitted to stand for those left out, before training
    held_out_prompts: PositiveInt = 32  # never trained on: acceptance is measured on them
    validation_prompts: PositiveInt = 16  # never trained on: they say when to stop
    prompt_tokens: PositiveInt = 128  # longest prompt
    answer_tokens: PositiveInt = 128  # longest answer
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (0.0, 0.7)  # of the answers, in turn
    loss: Literal[
        "forward_kl", "reverse_kl", "total_variation", "tvd++", "lk_alpha", "lk_hybrid", "cross_entropy"
    ] = "lk_hybrid"  # fmt: skip
    top_k: PositiveInt | None = None  # keep the target's likeliest tokens instead of its states
    on_policy: Annotated[float, Field(ge=0, le=1)] = 0.0  # fraction of prompts that the draft answers anew each epoch
    epochs: PositiveInt = 3
    patience: PositiveInt = 3  # epochs without a longer accepted length until training stops
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 4e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # fraction of the steps
    speculative_tokens: PositiveInt = 4
    draft_vocab_size: PositiveInt = 32000  # tokens that a head can propose: the commonest in the answers
    quantize: Literal["no", "fast", "default", "high"] = "default"  # the effort of the draft's own 4-bit weights

    @model_validator(mode="after")
    def _one_origin(self) -> "Draft":
        if self.kind == "eagle3":
            fields = type(self).model_fields
            given = [name for name in _OF_DRAFT_MODELS if getattr(self, name) != fields[name].default]
            if given:
                raise ValueError(f"kind eagle3 takes no {', '.join(given)}: leave out, or choose kind draft_model")
            return self
        if self.draft_vocab_size != type(self).model_fields["draft_vocab_size"].default:
            raise ValueError("draft_vocab_size is of kind eagle3: a draft model has the target's vocabulary")
        if (self.init is None) == (self.keep_layers is None):
            raise ValueError("give exactly one of init (a smaller checkpoint) and keep_layers (of the target's own)")
        return self


Chat = Annotated[str, BeforeValidator(spell_no)]


class Limits(Section):
    """What a candidate must keep, each limit of what was measured; None: no limit."""

    perplexity_drift: Fraction | None = None  # at most, on text
    kl: PositiveFloat | None = None  # nats a token, at most, on every set of text
    top1_agreement: Fraction | None = None  # at least, on every set of text
    served_gap: PositiveFloat | None = None  # nats a token, at most: vLLM's nll against that of the stored weights
    task_recovery: Fraction | None = None  # at least, of each task
    accepted_length: PositiveFloat | None = None  # at least, of the draft


class Evaluate(Text):
    """The held-out text, what is asked besides it, and the gates."""

    samples: PositiveInt | Literal["all"] = 32  # all: whole documents, every token scored
    stride: PositiveInt | None = None  # with samples all: scored tokens from window to window; the length, if not given
    chat: Chat = "auto"  # prompts that the reference answers, or no; auto: self:32 where it can write them
    chat_tokens: PositiveInt = 256  # longest answer
    long_length: Annotated[int, Field(ge=16)] | None = None  # tokens of a few longer windows, scored besides
    long_samples: PositiveInt = 4
    # The candidate is judged with each; auto: FP8 where it brings scales, else 16 bits
    kv_cache: tuple[
        Literal["auto", "float16", "fp8", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head"], ...
    ] = ("auto",)  # fmt: skip
    served: bool = False  # whether vLLM scores the same tokens
    tasks: tuple[str, ...] = ()  # of lm-eval
    task_limit: PositiveInt | None = None  # samples of a task
    profile: str = "default"  # of limits: one of eval/, or a file
    max_perplexity_drift: Fraction | None = None  # instead of the profile's

    @model_validator(mode="after")
    def _strided(self) -> "Evaluate":
        if self.stride is not None and self.samples != "all":
            raise ValueError("stride goes with samples all: drawn samples are windows that do not overlap")
        if self.stride is not None and self.stride > self.length:
            raise ValueError(f"stride {self.stride} leaves tokens out between windows of {self.length}: lower it")
        return self


class Serve(Section):
    """The limits of the deployment. What is left out is sized from the checkpoint or left to vLLM."""

    served_model_name: str | None = None
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt = 32
    max_num_batched_tokens: PositiveInt = 2048
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.92
    tensor_parallel_size: PositiveInt = 1
    # auto: FP8 where the target brings scales, else 16 bits
    kv_cache_dtype: Literal[
        "auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head"
    ] = "auto"  # fmt: skip
    kv_cache_skip_layers: Literal["auto"] | tuple[NonNegativeInt, ...] = "auto"  # at 16 bits; auto: the evaluation's
    uncalibrated_kv_cache: bool = False  # FP8 although the target brings no scales: it runs at 1.0
    prefix_caching: bool = True
    speculate: Literal["auto", "always", "never"] = "auto"  # auto: where the draft's plan is sure that it pays
    speculative_tokens: PositiveInt | None = None  # the draft's plan's, or 4 where it has none
    replicas: PositiveInt = 2  # of vLLM on one machine, in compose.yaml
    router: Literal["least_load", "cache_aware"] = "least_load"  # to the freest KV cache, or first to a known prefix
    ttft_limit_s: PositiveFloat = 2.0  # seconds to the first token, at the 95th percentile, beyond which an alert fires
    itl_limit_s: PositiveFloat = 0.2  # seconds between two tokens, likewise
    gpus_per_node: PositiveInt = 8  # of the cluster: a model that needs more is spread over several nodes, in k8s/


class Bench(Section):
    """What is put side by side on vLLM, under which load, against which limits. What is left out is by the machine."""

    variants: tuple[str, ...] = ()  # as w4+draft:4+prefix; each technique on top of those before it, if not given
    what_if: Annotated[float, Field(gt=0, lt=1)] | None = None  # acceptance of a draft that nobody has yet; GPUs only
    concurrencies: tuple[PositiveInt, ...] = ()
    rounds: PositiveInt = 3  # of all loads on all variants
    requests: PositiveInt | None = None  # of a load, at least as many as there are at once
    output_tokens: Annotated[int, Field(ge=2)] | None = None  # at most, of an answer
    prompts: str = "bundle"  # a text source, or those that the bundle carries
    system_prompt: str | None = None  # a file: the beginning that prompts share where prefix caching is measured
    temperatures: tuple[Temperature | Literal["deployment"], ...] = (0.0,)  # deployment: the target's own
    ttft_limit_s: PositiveFloat | None = None  # the bundle's
    tpot_limit_s: PositiveFloat | None = None
    price_per_hour: PositiveFloat | None = None  # of what one server runs on
    knee: bool = False  # whether guidellm looks for the load from which more requests add no tokens a second
    servers: Literal["auto", "together", "in turns"] = "auto"  # kept up side by side where memory allows it


ClaimName = Literal[
    "ttft_ms", "tokens_per_s", "users", "price_per_1m_tokens", "perplexity_drift", "acceptance", "kv_cache_gb"
]  # fmt: skip


class Claim(Section):
    """What somebody says that a deployment gives: before, after, or both."""

    before: PositiveFloat | None = None
    after: Fraction | None = None


class Planned(Section):
    """For `quantkit plan` alone: the machine, what is asked of it, and claims to hold against the arithmetic."""

    gpu: str  # as --gpu: h100-80gb:4
    context: PositiveInt = 4096  # tokens of a request, its answer among them
    answer_tokens: PositiveInt = 256
    users: PositiveInt = 32
    kv_cache: tuple[str, ...] = ()
    price_per_hour: PositiveFloat | None = None  # of one GPU
    acceptance: Annotated[float, Field(ge=0, le=1), BeforeValidator(parse_fraction)] | None = None
    draft_tokens: PositiveInt | None = None
    draft_size: Fraction | None = None  # of a draft that does not exist, as a part of the target
    claims: dict[ClaimName, Claim] = {}
    architecture: dict[str, Any] = {}  # the model's config.json, to plan without its weights


class Cluster(Section):
    """Where vLLM writes and answers; decides nothing of what comes out."""

    address: Annotated[str, AfterValidator(cluster_address)]  # as --on; `on` itself is a truth value of YAML


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    note: str = ""  # a line for the report: what a reader must know of this model
    model: str
    seed: Annotated[int, Field(ge=0)] = 0
    calibration: TextWindows
    quantize: Quantize = Quantize()
    draft: Draft
    evaluate: Evaluate
    serve: Serve = Serve()
    bench: Bench | None = None
    cluster: Cluster | None = None  # if not given, and no --on, this machine
    plan: Planned | None = None  # decides nothing of a run


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `section.key=value`, the value written as in YAML.

    Raises:
        QuantkitError: no such file, no YAML, or every wrong key and value with the nearest right name.
    """
    data = read_yaml("recipe", path, see="the folder recipes/ for some to start from")
    for override in overrides:
        _override(data, override)
    return check(Recipe, data, where=str(path))


def load_limits(path: Path) -> Limits:
    """Read and check a profile of limits.

    Raises:
        QuantkitError: no such file, no YAML, or every wrong key and value with the nearest right name.
    """
    return check(Limits, read_yaml("profile", path, see="the folder eval/ for those there are"), where=str(path))


def read_yaml(what: str, path: Path, *, see: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` it is and where to `see` more are for the error's words.

    Raises:
        QuantkitError: no such file, no YAML, or no mapping.
    """
    if path.is_dir():
        raise QuantkitError(f"{what} {path} is a folder: give one of the .yaml files in it")
    try:
        data = foreign.yaml_value(path, what=what)
    except FileNotFoundError:
        raise QuantkitError(f"{what} {path} is not there: see {see}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise QuantkitError(f"{what} {path} holds no keys: see {see}")
    return data


def check(model: type[ModelT], data: Mapping[str, Any], *, where: str) -> ModelT:
    """Validate data against a model, every problem as one line with the nearest right name for a wrong key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise_all([f"{where}: {_explain(model, detail)}" for detail in error.errors()])
        raise AssertionError("a validation error without details") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise QuantkitError(f"--set {override}: write it as section.key=value, for example quantize.group_size=32")
    value = foreign.yaml_text(text, what=f"--set {override}: {text!r}")
    *parents, last = key.split(".")
    here = data
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise QuantkitError(f"--set {override}: {parent} is a value, not a section")
    here[last] = value


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    path = [one_line(part)[:100] for part in detail["loc"]]
    dotted = ".".join(path) or "the recipe"
    if detail["type"] != "extra_forbidden":
        return f"{dotted}: {detail['msg'].removeprefix('Value error, ')}" + (
            f" (got {one_line(repr(detail['input']))[:200]})"
            if detail["type"] not in ("missing", "value_error")
            else ""
        )
    known = _fields_at(model, path[:-1])
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    return f"{dotted} is no setting; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}")


def _fields_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
