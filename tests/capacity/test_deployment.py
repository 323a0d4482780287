"""What fits: more memory never holds less, replicas before wider ones, and what would do where something does not."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.capacity import deployment, machines, planning, sizing, weights
from quantkit.capacity.planning import Column, Plan, Question
from quantkit.errors import QuantkitError

LLAMA2_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip
MODEL = weights.described("llama-2-70b", LLAMA2_70B)
H100 = machines.find("h100-80gb")


def _plan(**asked: object) -> Plan:
    return planning.make(MODEL, "h100-80gb", H100, Question.model_validate(asked), None)


def _by_name(plan: Plan) -> dict[str, Column]:
    return {column.name: column for column in plan.columns}


def test_sizes_of_llama_2_70b() -> None:
    assert weights.elements(MODEL.arch) == 68_976_648_192, "as its model card's safetensors say"
    stored, packed = weights.as_stored(MODEL), weights.at_4_bits(MODEL)
    assert stored.stored_bytes == 2 * 68_976_648_192
    linears = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    left = 68_976_648_192 - linears
    assert packed.stored_bytes == linears // 2 + linears // 128 * 5 // 2 + 2 * left
    assert packed.stored_bytes - packed.read_bytes == 2 * 32000 * 8192, "rows of the embedding are read, not all of it"


def test_four_bits_are_those_that_quantkit_writes(
    tiny_llama: Path, make_scaled: Callable[..., Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    made = weights.open_model(make_scaled(tiny_llama, texts[0], tmp_path / "made"))
    expected = weights.at_4_bits(weights.open_model(tiny_llama), group_sizes=(32,))
    assert made.checkpoint is not None
    beside = {"weight_shape": 16, "k_scale": 4, "v_scale": 4, "q_scale": 4}
    extra = sum(
        sizing.bytes_of(made.checkpoint, name)
        for path in sizing.safetensors_files(made.checkpoint) for name in sizing.tensor_shapes(path)
        if name.rpartition(".")[2] in beside
    )  # fmt: skip
    assert weights.as_stored(made).stored_bytes - extra == expected.stored_bytes


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1 << 12, 1 << 18), st.integers(0, 1 << 17), st.sampled_from([1, 2, 4, 8]), st.integers(16, 4096))
def test_more_memory_never_holds_less(mib: int, more: int, ranks: int, context: int) -> None:
    def blocks(mib: int, ranks: int, kind: str) -> int:
        return sizing.fit(
            LLAMA2_70B, 36 << 30, gpu_memory_bytes=mib << 20, tensor_parallel_size=ranks, kv_cache_dtype=kind,
            max_model_len=context,
        ).num_blocks  # fmt: skip

    assert blocks(mib + more, ranks, "auto") >= blocks(mib, ranks, "auto")
    assert blocks(mib, ranks, "fp8") in (2 * blocks(mib, ranks, "auto"), 2 * blocks(mib, ranks, "auto") + 1)
    assert blocks(mib, 2 * ranks, "auto") >= blocks(mib, ranks, "auto")


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 64), st.sampled_from([1024, 2048, 4096]))
def test_what_was_chosen_holds_what_it_says(gpus: int, users: int, context: int) -> None:
    try:
        plan = _plan(gpus=gpus, users=users, context=context)
    except QuantkitError as error:
        assert "does not fit" in str(error)
        return
    for column in plan.columns:
        if column.chosen is None:
            assert not any(layout.sizing.fits for layout in column.layouts)
            continue
        chosen = column.chosen
        assert chosen.ranks * chosen.replicas == gpus
        assert chosen.sequences == chosen.replicas * math.floor(chosen.sizing.concurrency)
        if chosen.sequences >= users:
            narrower = [one for one in column.layouts if one.ranks < chosen.ranks]
            assert all(one.sequences < users for one in narrower), "more replicas before wider ones"
        assert column.limits is not None and column.limits.max_num_seqs <= chosen.sizing.concurrency
        assert column.limits.max_num_batched_tokens >= column.limits.max_num_seqs


def test_the_original_needs_more_gpus_and_four_bits_do_not() -> None:
    columns = _by_name(_plan(users=32))
    assert columns["float16, by config.json; float16 KV"].chosen is None
    assert "would do: 4 GPUs" in columns["float16, by config.json; float16 KV"].why
    narrow = columns["4 bits, groups of 128; float16 KV"]
    assert narrow.chosen is not None and narrow.chosen.sequences < 32 and "an FP8 KV cache" in narrow.why
    fp8 = columns["4 bits, groups of 128; fp8 KV"]
    assert fp8.chosen is not None and fp8.chosen.sequences >= 32


def test_what_does_not_fit_at_all_is_refused_with_what_would() -> None:
    with pytest.raises(
        QuantkitError, match=r"does not fit on 1 x l4: .*float16 KV: weights 138\.0 GB .*would do: 8 GPUs"
    ):
        planning.make(MODEL, "l4", machines.find("l4"), Question(users=1, context=1024), None)


def test_heads_decide_how_many_ranks() -> None:
    assert deployment.rank_choices(MODEL, [], H100, 8) == [1, 2, 4, 8]
    assert deployment.rank_choices(MODEL, [], H100, 16) == [1, 2, 4, 8], "inside a node"
    assert deployment.rank_choices(MODEL, [], H100, 6) == [1, 2]


def test_questions_that_contradict_themselves() -> None:
    with pytest.raises(QuantkitError, match="answer tokens 256 leave no prompt"):
        _plan(context=128)
    with pytest.raises(QuantkitError, match="context 8192 exceeds the 4096 positions"):
        _plan(context=8192)
    with pytest.raises(QuantkitError, match="without a draft: give --draft DIR or --draft-size"):
        _plan(acceptance=0.5)
    with pytest.raises(QuantkitError, match="KV cache 'int3' is not known"):
        _plan(kv_caches=("int3",))
    with pytest.raises(QuantkitError, match="nobody counted how often"):
        planning.make(MODEL, "h100-80gb", H100, Question(), planning.draft_of_size(MODEL, 0.02))
