"""The vLLM flags of a bundle, typed, and the two files they become: `serve.yaml` for GPUs, `serve.cpu.yaml` for CPUs.

Read off vLLM 0.32.0. Keys are written with dashes only, and what is off is written as `no-enable-prefix-caching: true`:
`vllm serve --config` drops `enable-prefix-caching: false` without a word, as it looks for the option among those of the
program and not of its command.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantkit import speculation
from quantkit.capacity import sizing
from quantkit.errors import QuantkitError, one_line
from quantkit.kv_scheme import KvCacheType, has_kv_scheme
from quantkit.recipe import Serve
from quantkit.speculation import Decision, Plan, Profile

TARGET_DIR = "target"
DRAFT_DIR = "draft"
CONFIG_FILES: dict[Profile, str] = {"gpu": "vllm/serve.yaml", "cpu": "vllm/serve.cpu.yaml"}

_TOKENS_OF: dict[Profile, str] = {"gpu": "num_speculative_tokens", "cpu": "cpu_num_speculative_tokens"}

# vLLM turns method draft_model into another one when the draft's path holds one of these words, anywhere, in any case:
# /srv/my-eagle3-project/draft would be loaded as an EAGLE-3 head and fail.
PATH_TRAPS = ("eagle-", "eagle3", "dflash", "dspark")

_KINDS = {
    "draft_model": "the draft is a language model of its own", "eagle3": "the draft is a head on the target's states",
}  # fmt: skip

# The CPU backend never compares the cache's type with what its kernels know: it runs the others and answers noise.
CPU_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


class ServeSettings(BaseModel):
    """Every vLLM flag that a bundle sets. Sizes are tokens or sequences, memory is bytes, of one rank.

    `block_size`, `kv_cache_memory_bytes`, `cpu_dtype` (None: as `dtype`) and `cpu_num_speculative_tokens` (None: as
    `num_speculative_tokens`, 0: no speculation) are for the CPU file alone, `gpu_memory_utilization` and
    `tensor_parallel_size` for the GPU file. `replicas` and `router` are for compose.yaml, the limits for its alerts,
    `replicas` and `gpus_per_node` for k8s/.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    served_model_name: str = Field(min_length=1)
    max_model_len: int = Field(gt=0)
    max_num_seqs: int = Field(default=256, gt=0)
    max_num_batched_tokens: int = Field(default=8192, gt=0)
    speculative_method: Literal["draft_model", "eagle3"] = "draft_model"  # a bundle takes it from its draft
    num_speculative_tokens: int | None = Field(default=None, ge=0)  # 0: a draft, but not for the GPU file
    cpu_num_speculative_tokens: int | None = Field(default=None, ge=0)
    # (first, last, tokens) by number of sequences; of the profile in which it was measured
    speculative_schedule: dict[Profile, tuple[tuple[int, int, int], ...]] = {}
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    cpu_dtype: Literal["auto", "float16", "bfloat16", "float32"] | None = None
    kv_cache_dtype: KvCacheType = "auto"
    kv_cache_dtype_skip_layers: tuple[int, ...] = ()  # left in 16 bits
    uncalibrated_kv_cache: bool = False  # no flag: an FP8 cache at scale 1.0 was asked for, knowingly
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = Field(default=1, gt=0)
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    kv_cache_memory_bytes: int = Field(default=1 << 30, gt=0)
    block_size: int = Field(default=32, gt=0)
    seed: int = Field(default=0, ge=0)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    load_format: Literal["safetensors"] = "safetensors"
    max_logprobs: int = Field(default=20, ge=0)
    max_num_queued_reqs: int | None = Field(default=None, gt=0)
    shutdown_timeout: int = Field(default=30, ge=0)
    prefix_caching_hash_algo: Literal["sha256", "sha256_cbor"] = "sha256"
    disable_fastapi_docs: bool = True
    disable_access_log_for_endpoints: str = "/health,/metrics"
    replicas: int = Field(default=2, gt=0)
    router: Literal["least_load", "cache_aware"] = "least_load"
    ttft_limit_s: float = Field(default=2.0, gt=0)
    itl_limit_s: float = Field(default=0.2, gt=0)
    gpus_per_node: int = Field(default=8, gt=0)

    @field_validator("block_size")
    @classmethod
    def _whole_cpu_blocks(cls, block_size: int) -> int:
        if block_size % 32:
            raise ValueError("CPU attention works in blocks of 32 tokens: give a multiple of 32")
        return block_size

    def draft_tokens(self, profile: Profile) -> int:
        """How many tokens a profile drafts at a time; 0 where it does not speculate."""
        own = self.cpu_num_speculative_tokens if profile == "cpu" else None
        return (own if own is not None else self.num_speculative_tokens) or 0

    @property
    def speculates(self) -> bool:
        """Whether any profile does: then the bundle holds the draft."""
        return any(self.draft_tokens(profile) for profile in CONFIG_FILES)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ServeSettings":
        """The settings from plain values, such as the `serve` part of a recipe.

        Raises:
            QuantkitError: every value that is wrong, named with what it was and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [
                f"{one_line('.'.join(map(str, e['loc'])))[:100]} = {one_line(repr(e['input']))[:200]}: {e['msg']}"
                for e in error.errors()
            ]
            raise QuantkitError("serve settings: " + "; ".join(lines)) from error


def problems(
    settings: ServeSettings, target_config: Mapping[str, Any], draft_config: Mapping[str, Any] | None
) -> list[str]:
    """What would make vLLM refuse these settings for these checkpoints, or run them wrongly; one line each."""
    found = sizing.head_problems(target_config, settings.tensor_parallel_size, "target")
    if draft_config is not None:
        found += sizing.head_problems(draft_config, settings.tensor_parallel_size, "draft")
        found += _speculation_problems(settings, target_config, draft_config)
    elif settings.speculates:
        found.append(
            f"num_speculative_tokens {settings.num_speculative_tokens} without a draft: give a draft, or leave it out"
        )
    ranks, node = settings.tensor_parallel_size, settings.gpus_per_node
    if ranks > node and ranks % node:
        found.append(f"tensor_parallel_size {ranks} takes no whole number of nodes of {node} GPUs: mend gpus_per_node")
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        found.append(
            f"max_num_batched_tokens {settings.max_num_batched_tokens} is below max_num_seqs {settings.max_num_seqs}: "
            "raise the former or lower the latter"
        )
    limit = int(target_config.get("max_position_embeddings") or settings.max_model_len)
    if settings.max_model_len > limit:
        found.append(f"max_model_len {settings.max_model_len} exceeds the {limit} positions of the target: lower it")
    for role, config in (("target", target_config), ("draft", draft_config)):
        quantization = (config or {}).get("quantization_config") or {}
        if quantization.get("quant_method") and "float32" in (settings.dtype, settings.cpu_dtype):
            found.append(
                f"dtype float32: the 4-bit kernels of the {role} ({quantization['quant_method']}) know 16-bit types "
                "only: use auto, float16 or bfloat16"
            )
        if quantization.get("kv_cache_scheme") and settings.kv_cache_dtype == "fp8_e5m2":
            found.append(f"kv_cache_dtype fp8_e5m2: the {role} carries e4m3 scales for its KV cache: use auto or fp8")
    return found + _cache_problems(settings, target_config)


def _cache_problems(settings: ServeSettings, target_config: Mapping[str, Any]) -> list[str]:
    found = []
    scaled = settings.kv_cache_dtype in ("fp8", "fp8_e4m3")
    if scaled and not has_kv_scheme(target_config) and not settings.uncalibrated_kv_cache:
        found.append(
            f"kv_cache_dtype {settings.kv_cache_dtype}: {_why_bare(target_config)}, and vLLM would take 1.0 for every "
            "scale: quantize with kv_cache fp8 in the format compressed-tensors, or say that this is meant with "
            "uncalibrated_kv_cache"
        )
    layers = int(target_config.get("num_hidden_layers") or 0)
    if beyond := [index for index in settings.kv_cache_dtype_skip_layers if layers and index >= layers]:
        found.append(f"kv_cache_skip_layers {beyond}: the target has layers 0 to {layers - 1}")
    return found


def _why_bare(config: Mapping[str, Any]) -> str:
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("awq", "gptq"):
        return f"a checkpoint in {method} format cannot carry scales for it"
    return "the target carries no scales for it"


def warnings(
    settings: ServeSettings, target_config: Mapping[str, Any], draft_config: Mapping[str, Any] | None = None
) -> list[str]:
    """What works but should be known by whoever runs the bundle; one line each, for its README and bundle.json."""
    lines = []
    scheme = has_kv_scheme(target_config)
    if settings.kv_cache_dtype.startswith("fp8") and not scheme and settings.kv_cache_dtype != "fp8_per_token_head":
        said = f"kv-cache-dtype {settings.kv_cache_dtype} runs with uncalibrated scales of 1.0"
        lines.append(f"{said}: {_why_bare(target_config)}.")
    if scheme and settings.kv_cache_dtype in ("float16", "bfloat16"):
        lines.append(
            f"kv-cache-dtype {settings.kv_cache_dtype} overrides the FP8 cache that the checkpoint has scales for."
        )
    if draft_config is not None:
        limit = int(draft_config.get("max_position_embeddings") or settings.max_model_len)
        if limit < settings.max_model_len:
            lines.append(
                f"The draft knows {limit} positions and max-model-len is {settings.max_model_len}: beyond {limit} "
                "tokens nothing is gained by speculation."
            )
        if scheme and not has_kv_scheme(draft_config):
            lines.append("The draft shares the target's FP8 KV cache type but carries no scales: its own are 1.0.")
    if settings.host not in ("127.0.0.1", "localhost", "::1"):
        lines.append(
            f"host {settings.host} is open to the network, and vLLM's API key does not guard /invocations, /metrics "
            "or /tokenize: put a proxy with an allow-list in front."
        )
    return lines


def to_yaml(settings: ServeSettings, profile: Profile, *, sources: Mapping[str, str]) -> str:
    """One profile's file for `vllm serve --config`, to be run from the bundle's own folder.

    Args:
        sources: setting name -> where its value came from ("recipe", "sizing", ...); what is not named is a default.
            Written as a comment on each flag.
    """
    has_draft = settings.draft_tokens(profile) > 0
    flags = [spelled(name, value, field) for name, field, value in _flags(settings, profile, has_draft)]
    width = max(len(f"{name}: {_scalar(value)}") for name, _, value in flags)
    lines = [*_heading(profile), f"model: {TARGET_DIR}"]
    for name, field, value in flags:
        source = sources.get(field, "default") if field in ServeSettings.model_fields else field
        lines.append(f"{f'{name}: {_scalar(value)}':<{width}}  # {source}")
    if has_draft:
        lines += ["speculative-config:"]
        for name, value, source in _speculation(settings, profile, sources):
            lines.append(f"  {name}: {_scalar(value)}  # {source}")
    if profile == "cpu":
        lines += ["", "# Left out or changed against vllm/serve.yaml, because the CPU backend cannot do it:"]
        lines += [f"# - {line}" for line in _left_out(settings, has_draft)]
    return "\n".join(lines) + "\n"


# Of the server before the engine: for whoever starts the engine in a server of their own they mean nothing.
_OF_THE_SERVER = ("served_model_name", "host", "port", "max_num_queued_reqs", "shutdown_timeout",
                  "disable_fastapi_docs", "disable_access_log_for_endpoints")  # fmt: skip


def engine_arguments(settings: ServeSettings, profile: Profile) -> dict[str, Any]:
    """The flags of one profile as arguments of vLLM's engine, the draft as in the file: relative to the bundle."""
    has_draft = settings.draft_tokens(profile) > 0
    named = {name.replace("-", "_"): value for name, _, value in _flags(settings, profile, has_draft)}
    arguments = {name: value for name, value in named.items() if name not in _OF_THE_SERVER}
    if has_draft:
        arguments["speculative_config"] = {name: value for name, value, _ in _speculation(settings, profile, {})}
    return arguments


def spelled(name: str, value: object, field: str = "") -> tuple[str, str, object]:
    """(flag, where it comes from, value) as the file must have it for `vllm serve` to see it."""
    return (f"no-{name}", field, True) if value is False else (name, field, value)


def _heading(profile: Profile) -> list[str]:
    machine = "GPUs" if profile == "gpu" else "a CPU, for trying the bundle out: its speed says nothing of a GPU"
    return [
        f"# vLLM 0.32 settings for {machine}.",
        f"# Run from the bundle's folder, as its paths are relative: vllm serve --config {CONFIG_FILES[profile]}",
        "# The comment on a flag says where its value came from. A flag on the command line wins over this file.",
        "# There is no quantization flag on purpose: vLLM reads it from the checkpoint and picks the fastest kernel.",
    ]


def _flags(settings: ServeSettings, profile: Profile, has_draft: bool) -> list[tuple[str, str, object]]:
    """(flag, setting it comes from or the reason for it, value), in the order of the file."""
    on_cpu = profile == "cpu"
    names = ["served_model_name", "host", "port", "load_format", "dtype", "seed", "max_model_len", "max_num_seqs",
             "max_num_batched_tokens"]  # fmt: skip
    if settings.max_num_queued_reqs is not None:
        names.append("max_num_queued_reqs")
    names += ["block_size", "kv_cache_memory_bytes"] if on_cpu else ["tensor_parallel_size", "gpu_memory_utilization"]
    names += ["kv_cache_dtype", *(["kv_cache_dtype_skip_layers"] if settings.kv_cache_dtype_skip_layers else []),
              "enable_prefix_caching", "prefix_caching_hash_algo", "max_logprobs",
              "shutdown_timeout", "disable_fastapi_docs", "disable_access_log_for_endpoints"]  # fmt: skip
    values: dict[str, object] = {name: getattr(settings, name) for name in names}
    if settings.kv_cache_dtype_skip_layers:  # words, as some of them may be kinds of layers
        values["kv_cache_dtype_skip_layers"] = [str(index) for index in settings.kv_cache_dtype_skip_layers]
    flags = [(name.replace("_", "-"), name, value) for name, value in values.items()]
    if not on_cpu:
        return flags
    if settings.kv_cache_dtype not in CPU_KV_CACHE_DTYPES:
        flags = [(n, "changed, see below", "auto") if n == "kv-cache-dtype" else (n, f, v) for n, f, v in flags]
    if settings.cpu_dtype is not None:
        flags = [(n, "cpu_dtype", settings.cpu_dtype) if n == "dtype" else (n, f, v) for n, f, v in flags]
    flags.append(("enforce-eager", "compiling takes minutes and a C++ compiler", True))
    if has_draft:
        greedy = {"temperature": 0}
        flags.append(("override-generation-config", "greedy unless a request says otherwise, see below", greedy))
    return flags


def _speculation(
    settings: ServeSettings, profile: Profile, sources: Mapping[str, str]
) -> list[tuple[str, object, str]]:
    lines: list[tuple[str, object, str]] = [
        ("method", settings.speculative_method, _KINDS[settings.speculative_method]),
        # Relative, and so free of whatever words the folders above hold: see PATH_TRAPS.
        ("model", DRAFT_DIR, "relative on purpose: vLLM guesses another method from some words in a path"),
        ("num_speculative_tokens", settings.draft_tokens(profile), _source_of_tokens(settings, profile, sources)),
    ]
    if schedule := settings.speculative_schedule.get(profile):
        ranges: object = [list(one) for one in schedule]
        lines.append(("num_speculative_tokens_per_batch_size", ranges, "the plan: [from, to, tokens] by sequences"))
    if profile == "gpu" and settings.tensor_parallel_size > 1:
        # Configuration would let 1 pass and the workers then refuse it at start-up.
        lines.append(("draft_tensor_parallel_size", settings.tensor_parallel_size, "must equal the target's"))
    return lines


def _source_of_tokens(settings: ServeSettings, profile: Profile, sources: Mapping[str, str]) -> str:
    own = profile == "cpu" and settings.cpu_num_speculative_tokens is not None
    return sources.get("cpu_num_speculative_tokens" if own else "num_speculative_tokens", "default")


def _left_out(settings: ServeSettings, has_draft: bool) -> list[str]:
    lines = [
        f"gpu-memory-utilization {settings.gpu_memory_utilization}: here a share of the machine's memory, all of which "
        "must be free at start; kv-cache-memory-bytes stands for it.",
        f"block-size {settings.block_size}: vLLM chooses 16 on a GPU and 128 here, where shared prefixes below 128 "
        "tokens would never hit the cache.",
        f"tensor-parallel-size {settings.tensor_parallel_size}: 1 here, as each CPU rank wants a NUMA node of its own"
        + (" (draft_tensor_parallel_size likewise)." if has_draft else "."),
        "CUDA graphs and torch.compile: enforce-eager.",
        "async-scheduling: the CPU backend switches it off.",
        "x86 without AVX-512: no 4-bit kernel, no FP8 cache, no 16-bit products in vLLM's CPU build; `quantkit "
        "serve up` runs the dequantized weights and the cache in float32 instead, and says so.",
    ]
    if settings.cpu_dtype is not None:
        lines.append(f"dtype {settings.dtype}: {settings.cpu_dtype} here, by the setting cpu_dtype.")
    elif settings.dtype in ("auto", "float16"):
        lines.append(
            "dtype: float16, which auto keeps for a float16 checkpoint, has no fast kernel on a CPU without "
            "AVX512-FP16 (a prompt takes over ten times as long): start with --dtype bfloat16 where speed matters more "
            "than the same numbers."
        )
    if settings.kv_cache_dtype not in CPU_KV_CACHE_DTYPES:
        lines.append(
            f"kv-cache-dtype {settings.kv_cache_dtype}: no CPU kernel knows it and vLLM does not refuse it, it answers "
            "noise; auto stands for it."
        )
    if settings.kv_cache_dtype.startswith("fp8") or settings.kv_cache_dtype == "auto":
        lines.append(
            "FP8 KV cache, by flag or by the checkpoint's own scheme: works, but values are cut off instead of "
            "rounded, about twice the error of a GPU: do not judge the cache's quality by this machine."
        )
    if has_draft:
        lines.append(
            "temperature above 0: with a draft, vLLM 0.32 answers noise on CPUs (its rejection sampler loses the "
            "temperatures); override-generation-config makes greedy the default, so do not ask for more than 0."
        )
    return lines


def _speculation_problems(
    settings: ServeSettings, target_config: Mapping[str, Any], draft_config: Mapping[str, Any]
) -> list[str]:
    found = []
    most = max(settings.draft_tokens(profile) for profile in CONFIG_FILES)
    if not most:
        found.append("num_speculative_tokens is missing: with a draft, say how many tokens it proposes at a time")
    else:
        needed = settings.max_num_seqs * (most + 1)
        if settings.max_num_batched_tokens < needed:
            found.append(
                f"max_num_batched_tokens {settings.max_num_batched_tokens} cannot hold {settings.max_num_seqs} "
                f"sequences of {most} draft tokens and their own: raise it to {needed} or "
                "lower max_num_seqs"
            )
    sizes = target_config.get("vocab_size"), draft_config.get("vocab_size")
    if sizes[0] != sizes[1]:
        found.append(
            f"vocab_size of target ({sizes[0]}) and draft ({sizes[1]}) differ: they must be equal, padding included"
        )
    return found


def _scalar(value: object) -> str:
    """A value in the part of YAML that is JSON: no word is taken for a number, a date or a truth value."""
    return json.dumps(value)


def from_recipe(
    recipe: Serve,
    target: Path,
    *,
    plans: Mapping[Profile, Plan] | None,
    left_at_16_bits: Sequence[int] = (),
    method: Literal["draft_model", "eagle3"] = "draft_model",
) -> tuple[ServeSettings, dict[str, str], dict[Profile, Decision]]:
    """The flags of a recipe's `serve` section for a target, where each value came from, and what of speculation.

    What the recipe leaves out: the model's name is that of the target's directory, the longest request the model's
    own limit. The CPU profile runs in bfloat16, for which processors have fast kernels and for float16 not.

    plans: the draft's, by kind of machine; None where there is no draft, and so nothing to decide.
    left_at_16_bits: the layers whose KV cache the evaluation would leave so.
    method: the draft's. Of eagle3 vLLM takes another number of tokens for each number of sequences.
    """
    config = sizing.read_config(target)
    limit = int(config.get("max_position_embeddings") or 2048)
    elsewhere = {"speculate", "speculative_tokens", "prefix_caching", "served_model_name", "max_model_len"}
    elsewhere |= {"kv_cache_skip_layers"}
    values = recipe.model_dump(exclude=elsewhere)
    values["enable_prefix_caching"] = recipe.prefix_caching
    values["served_model_name"] = recipe.served_model_name or target.resolve().name
    values["max_model_len"] = recipe.max_model_len or limit
    values["cpu_dtype"] = "bfloat16"
    sources = dict.fromkeys(values, "recipe") | {"cpu_dtype": "the processor's fast type"}
    left = recipe.kv_cache_skip_layers
    values["kv_cache_dtype_skip_layers"] = tuple(left_at_16_bits) if left == "auto" else left
    sources["kv_cache_dtype_skip_layers"] = "the evaluation" if left == "auto" else "recipe"
    if recipe.max_model_len is None:
        sources["max_model_len"] = "the model's own limit"
    if recipe.served_model_name is None:
        sources["served_model_name"] = "the target's directory"
    decisions: dict[Profile, Decision] = {}
    if plans is not None:
        asked = recipe.speculative_tokens
        for profile, name in _TOKENS_OF.items():
            plan = plans.get(profile)
            if method == "eagle3" and plan and asked is None and recipe.speculate == "auto":
                schedule = speculation.schedule(plan, max_num_seqs=recipe.max_num_seqs)
                if schedule:
                    values.setdefault("speculative_schedule", {})[profile] = tuple(schedule)
                    sources["speculative_schedule"] = "the plan"
            decisions[profile] = speculation.decide(
                recipe.speculate, plan, max_num_seqs=recipe.max_num_seqs, tokens=asked,
                by_load="speculative_schedule" in values and profile in values["speculative_schedule"],
            )  # fmt: skip
            values[name] = decisions[profile].tokens
            sources[name] = "recipe" if asked else "the draft's plan" if profile in plans else "default"
    return ServeSettings.of(values), sources, decisions
