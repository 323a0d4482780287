"""What is served side by side: the baseline or the bundle's target, with the techniques that a name puts together.

A name is written as it is read: `fp16`, `w4`, `w4+draft:4+prefix`. Everything that it does not change is as in the
bundle's own settings file.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quantkit.capacity import sizing
from quantkit.errors import QuantkitError
from quantkit.kv_scheme import has_kv_scheme
from quantkit.serve import bundle as bundles
from quantkit.serve import processor
from quantkit.serve.settings import DRAFT_DIR, TARGET_DIR, spelled
from quantkit.speculation import Profile

Speculation = Literal["draft", "ngram", "what-if"]

WORDS = "fp16 or w4, then any of serial, draft[:TOKENS], ngram[:TOKENS], what-if:ACCEPTANCE, prefix, fp8"
_PARTS = ("serial", "draft", "ngram", "what-if", "prefix", "fp8")
_NGRAM_TOKENS = 4
# Prompt lookup: the longest and the shortest end of the text that is looked for in what stands before it.
_NGRAM_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


class Variant(NamedTuple):
    """A server: which weights, and which techniques on top of them.

    tokens: drafted at a time; None as in the bundle. acceptance: of a draft that nobody has yet, a token.
    """

    quantized: bool
    serial: bool = False
    speculation: Speculation | None = None
    tokens: int | None = None
    acceptance: float | None = None
    prefix: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        """As it is written."""
        parts = ["w4" if self.quantized else "fp16"] + ["serial"] * self.serial
        if self.speculation == "what-if":
            parts.append(f"what-if:{self.acceptance:g}" + (f":{self.tokens}" if self.tokens else ""))
        elif self.speculation:
            parts.append(self.speculation + (f":{self.tokens}" if self.tokens else ""))
        return "+".join([*parts, *["prefix"] * self.prefix, *["fp8"] * self.fp8])

    @property
    def words(self) -> str:
        """In words."""
        drafted = {"draft": "a draft", "ngram": "prompt lookup", "what-if": f"a draft of acceptance {self.acceptance}"}
        parts = ["4-bit target" if self.quantized else "16-bit checkpoint"]
        parts += ["one request at a time"] if self.serial else []
        parts += [drafted[self.speculation]] if self.speculation else []
        parts += ["prefix caching"] * self.prefix + ["FP8 KV cache"] * self.fp8
        return ", ".join(parts)


def parse(name: str) -> Variant:
    """The variant that a name stands for.

    Raises:
        QuantkitError: a word of it is none.
    """
    base, *parts = name.split("+")
    if base not in ("fp16", "w4"):
        raise QuantkitError(f"variant {name!r} begins with {base!r}: write {WORDS}, joined by +")
    values: dict[str, Any] = {"quantized": base == "w4"}
    for part in parts:
        word, _, rest = part.partition(":")
        if word not in _PARTS:
            near = difflib.get_close_matches(word, _PARTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"write {WORDS}, joined by +"
            raise QuantkitError(f"variant {name!r}: {part!r} is no technique; {hint}")
        try:
            more = _speculation(word, rest) if word in ("draft", "ngram", "what-if") else {word: _bare(rest)}
        except ValueError:
            raise QuantkitError(f"variant {name!r}: {part!r} is not understood; write {WORDS}, joined by +") from None
        if clash := more.keys() & values.keys():
            raise QuantkitError(f"variant {name!r} says {', '.join(sorted(clash))} twice: leave one out")
        values |= more
    return Variant(**values)


def _speculation(word: str, rest: str) -> dict[str, Any]:
    acceptance, _, tokens = rest.partition(":") if word == "what-if" else ("", "", rest)
    found: dict[str, Any] = {"speculation": word}
    if word == "what-if":
        found["acceptance"] = float(acceptance)
        if not 0 < found["acceptance"] < 1:
            raise ValueError
    if tokens:
        found["tokens"] = int(tokens)
        if found["tokens"] < 1:
            raise ValueError
    return found


def _bare(rest: str) -> bool:
    if rest:
        raise ValueError
    return True


def ladder(bundle: Path, *, what_if: float | None = None) -> list[Variant]:
    """Each technique on top of those before it, as far as the bundle goes."""
    drafted = (bundle / DRAFT_DIR).is_dir()
    steps = [Variant(False, serial=True), Variant(False), Variant(True)]
    if drafted:
        steps.append(Variant(True, speculation="draft"))
    if what_if is not None:
        steps.append(Variant(True, speculation="what-if", acceptance=what_if))
    last = Variant(True, speculation="draft" if drafted else None)
    return [*steps, last._replace(prefix=True), last._replace(prefix=True, fp8=True)]


def flags(variant: Variant, bundle: Path, baseline: Path, profile: Profile) -> dict[str, Any]:
    """vLLM's flags of a variant: the bundle's own, changed by what the name says; paths of the bundle are relative."""
    found = bundles.read_flags(bundle, profile)
    found["model"] = TARGET_DIR if variant.quantized else str(baseline.resolve())
    for name in ("enable-prefix-caching", "no-enable-prefix-caching"):
        found.pop(name, None)
    name, _, value = spelled("enable-prefix-caching", variant.prefix)
    found[name] = value
    if variant.serial:
        found["max-num-seqs"] = 1
    own = found.pop("speculative-config", None)
    if variant.speculation == "ngram":
        found["speculative-config"] = {
            "method": "ngram", "num_speculative_tokens": variant.tokens or _NGRAM_TOKENS, **_NGRAM_LOOKUP,
        }  # fmt: skip
    elif variant.speculation:
        found["speculative-config"] = _drafting(variant, own, bundle)
    if not variant.fp8:
        found.pop("kv-cache-dtype-skip-layers", None)
        found["kv-cache-dtype"] = _sixteen_bits(found, bundle) if variant.quantized else "auto"
    return found


def _drafting(variant: Variant, own: Mapping[str, Any] | None, bundle: Path) -> dict[str, Any]:
    kind = sizing.speculative_method(sizing.read_config(bundle / DRAFT_DIR))
    found = dict(own or {"method": kind, "model": DRAFT_DIR, "num_speculative_tokens": 4})
    if variant.tokens:
        found |= {"num_speculative_tokens": variant.tokens}
        found.pop("num_speculative_tokens_per_batch_size", None)
    if variant.acceptance is not None:
        rates = [variant.acceptance ** (place + 1) for place in range(found["num_speculative_tokens"])]
        found |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    return found


def _sixteen_bits(found: Mapping[str, Any], bundle: Path) -> str:
    """The type of the cache without FP8: what `auto` means, unless the target promises scales."""
    config = sizing.read_config(bundle / TARGET_DIR)
    if not has_kv_scheme(config):
        return "auto"
    asked = str(found.get("dtype", "auto"))
    return asked if asked in ("float16", "bfloat16") else sizing.kv_dtype({**config, "quantization_config": {}}, "auto")


def substitutes(variant: Variant, found: Mapping[str, Any], bundle: Path, baseline: Path) -> list[processor.Substitute]:
    """What stands on this processor for what the flags ask for."""
    models = [bundle / TARGET_DIR if variant.quantized else baseline]
    if variant.speculation in ("draft", "what-if"):
        models.append(bundle / DRAFT_DIR)
    return processor.substitutes_for(found, [sizing.read_config(model) for model in models])


def unavailable(variant: Variant, bundle: Path, profile: Profile, *, without_fp8: bool) -> str | None:
    """Why a variant cannot be served here; None where it can."""
    if variant.speculation in ("draft", "what-if") and not (bundle / DRAFT_DIR).is_dir():
        return "the bundle holds no draft: build it with serve.speculate always"
    if variant.speculation == "what-if" and profile == "cpu":
        return (
            "vLLM's synthetic acceptance needs a GPU: `quantkit plan --acceptance` answers by arithmetic what a draft "
            "of this acceptance would give"
        )
    if variant.fp8 and profile == "cpu" and without_fp8:
        return "vLLM's CPU build keeps an FP8 cache on processors with AVX-512 alone"
    if variant.fp8 and variant.quantized and not _promises_fp8(bundle, profile):
        return "the bundle serves no FP8 cache: quantize with kv_cache fp8 for one"
    if variant.fp8 and not variant.quantized:
        return "the baseline brings no scales for an FP8 cache"
    return None


def _promises_fp8(bundle: Path, profile: Profile) -> bool:
    asked = str(bundles.read_flags(bundle, profile).get("kv-cache-dtype", "auto"))
    return asked.startswith("fp8") or (asked == "auto" and has_kv_scheme(sizing.read_config(bundle / TARGET_DIR)))


def without(variant: Variant) -> list[tuple[str, Variant]]:
    """Each technique of a variant, with the variant that lacks it alone."""
    found = [] if variant.serial else [("continuous batching", variant._replace(serial=True))]
    if variant.quantized:
        found.append(("4-bit weights", variant._replace(quantized=False)))
    if variant.speculation:
        found.append(("speculation", variant._replace(speculation=None, tokens=None, acceptance=None)))
    if variant.prefix:
        found.append(("prefix caching", variant._replace(prefix=False)))
    if variant.fp8:
        found.append(("FP8 KV cache", variant._replace(fp8=False)))
    return found


def pairs(measured: Sequence[Variant]) -> list[tuple[str, Variant, Variant]]:
    """(technique, with it, without it) of all that were measured."""
    return [
        (technique, variant, lacking)
        for variant in measured
        for technique, lacking in without(variant)
        if lacking in measured
    ]
