"""Names of variants, and the flags they stand for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.bench import variants
from quantkit.bench.variants import Variant
from quantkit.errors import QuantkitError

VARIANTS = st.builds(
    Variant, quantized=st.booleans(), serial=st.booleans(), speculation=st.sampled_from([None, "draft", "ngram"]),
    tokens=st.none(), acceptance=st.none(), prefix=st.booleans(), fp8=st.booleans(),
)  # fmt: skip


@given(VARIANTS, st.integers(1, 16))
def test_a_name_stands_for_its_variant(variant: Variant, tokens: int) -> None:
    assert variants.parse(variant.name) == variant
    if variant.speculation:
        some = variant._replace(tokens=tokens)
        assert variants.parse(some.name) == some


def test_a_draft_that_nobody_has() -> None:
    found = variants.parse("w4+what-if:0.7:5")
    assert (found.speculation, found.acceptance, found.tokens) == ("what-if", 0.7, 5)
    assert variants.parse(found.name) == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w8", "begins with 'w8'"), ("w4+drat", "did you mean draft"), ("w4+draft:none", "not understood"),
        ("w4+draft:0", "not understood"), ("w4+prefix:2", "not understood"), ("w4+draft+ngram", "speculation twice"),
        ("w4+what-if:1.5", "not understood"), ("w4+", "is no technique"),
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(name: str, said: str) -> None:
    with pytest.raises(QuantkitError, match=said):
        variants.parse(name)


def test_each_technique_stands_on_those_before_it(bundle: Path) -> None:
    ladder = variants.ladder(bundle, what_if=0.7)
    names = [one.name for one in ladder]
    assert names == [
        "fp16+serial", "fp16", "w4", "w4+draft", "w4+what-if:0.7", "w4+draft+prefix", "w4+draft+prefix+fp8",
    ]  # fmt: skip
    told = [(technique, with_.name, without.name) for technique, with_, without in variants.pairs(ladder)]
    assert told == [
        ("continuous batching", "fp16", "fp16+serial"), ("4-bit weights", "w4", "fp16"),
        ("speculation", "w4+draft", "w4"), ("speculation", "w4+what-if:0.7", "w4"),
        ("prefix caching", "w4+draft+prefix", "w4+draft"), ("FP8 KV cache", "w4+draft+prefix+fp8", "w4+draft+prefix"),
    ]  # fmt: skip


def test_flags_are_the_bundles_but_for_what_the_name_says(bundle: Path, tiny_llama: Path) -> None:
    def of(name: str) -> dict[str, object]:
        return variants.flags(variants.parse(name), bundle, tiny_llama, "cpu")

    plain = of("w4")
    assert plain["model"] == "target" and plain["max-num-seqs"] == 4 and "speculative-config" not in plain
    assert plain["no-enable-prefix-caching"] is True and "enable-prefix-caching" not in plain
    assert of("w4+prefix")["enable-prefix-caching"] is True
    assert of("fp16")["model"] == str(tiny_llama) and of("fp16+serial")["max-num-seqs"] == 1
    own = of("w4+draft")["speculative-config"]
    assert own == {"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}
    assert of("w4+draft:5")["speculative-config"] == own | {"num_speculative_tokens": 5}
    assert of("w4+ngram:2")["speculative-config"]["method"] == "ngram"  # type: ignore[index]
    what_if = of("w4+what-if:0.5:2")["speculative-config"]
    assert what_if["rejection_sample_method"] == "synthetic"  # type: ignore[index]
    assert what_if["synthetic_acceptance_rates"] == [0.5, 0.25]  # type: ignore[index]


def test_what_cannot_run_says_why(bundle: Path) -> None:
    def why(name: str, *, without_fp8: bool = False) -> str | None:
        return variants.unavailable(variants.parse(name), bundle, "cpu", without_fp8=without_fp8)

    assert why("w4+draft+prefix") is None
    assert "quantkit plan --acceptance" in str(why("w4+what-if:0.7"))
    assert "AVX-512" in str(why("w4+fp8", without_fp8=True))
    assert "quantize with kv_cache fp8" in str(why("w4+fp8"))
