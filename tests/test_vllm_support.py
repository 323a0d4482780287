"""What vLLM does not load is refused with what to choose instead; what it loads is not."""

import pytest

from quantkit.vllm_support import cpu_only, cuda_only, unsupported

SHAPES = {"layers.0.q_proj": (576, 576), "layers.0.down_proj": (576, 1536), "layers.1.q_proj": (576, 576)}


@pytest.mark.parametrize(
    ("format", "bits", "group_size", "symmetric"),
    [
        ("awq", 4, 64, False),
        ("awq", 4, 192, False),
        ("awq", 4, 64, True),
        ("gptq", 4, 64, True),
        ("gptq", 8, -1, True),
        ("compressed-tensors", 4, 64, True),
        ("compressed-tensors", 4, 96, False),
        ("compressed-tensors", 4, -1, False),
        ("compressed-tensors", 8, 64, True),
    ],
)
def test_what_vllm_loads_has_no_reasons(format: str, bits: int, group_size: int, symmetric: bool) -> None:
    assert unsupported(format, bits=bits, group_size=group_size, symmetric=symmetric, shapes=SHAPES) == []


@pytest.mark.parametrize(
    ("format", "bits", "group_size", "symmetric", "reason"),
    [
        ("awq", 8, 64, False, "awq with 8 bits is not loaded by vLLM 0.32: choose 4 bits"),
        ("gptq", 3, 64, True, "choose 4 or 8 bits"),
        ("gptq", 4, 64, False, "choose a symmetric grid, or the format awq or compressed-tensors"),
        (
            "gptq",
            4,
            96,
            True,
            "gptq with group size 96 is not loaded by vLLM 0.32: choose one of -1, 32, 64, 128",
        ),
        ("awq", 4, 3, False, "choose -1 or an even number"),
        ("awq", 4, 0, False, "choose -1 or an even number"),
        ("compressed-tensors", 8, 64, False, "Hopper alone"),
        (
            "awq",
            4,
            128,
            False,
            "in_features 576 of layers.0.q_proj and 1 more is not divisible by group size 128: "
            "choose 32, 64, 96, 192, -1",
        ),
        (
            "gptq",
            4,
            128,
            True,
            "of layers.0.q_proj and 1 more is not divisible by group size 128: choose 32, 64, -1",
        ),
    ],
)
def test_what_vllm_does_not_load_says_what_to_choose(
    format: str, bits: int, group_size: int, symmetric: bool, reason: str
) -> None:
    reasons = unsupported(format, bits=bits, group_size=group_size, symmetric=symmetric, shapes=SHAPES)
    assert len(reasons) == 1 and reason in reasons[0] and "\n" not in reasons[0]


def test_all_reasons_at_once() -> None:
    shapes = {"a": (12, 24), "b": (12, 20)}
    reasons = unsupported("gptq", bits=4, group_size=24, symmetric=False, shapes=shapes)
    assert len(reasons) == 5
    assert any("out_features 12 of a and 1 more is not divisible by 8" in reason for reason in reasons)
    assert any("in_features 20 of b is not divisible by 8" in reason for reason in reasons)
    # Without zero points compressed-tensors packs nothing along out_features.
    scheme = {"bits": 4, "group_size": 8, "symmetric": True}
    assert unsupported("compressed-tensors", **scheme, shapes={"a": (12, 24)}) == []  # type: ignore[arg-type]


def test_limits_of_the_cpu_build() -> None:
    def limits(bits: int, shapes: dict[str, tuple[int, int]]) -> list[str]:
        return cuda_only("compressed-tensors", bits=bits, group_size=-1, symmetric=True, shapes=shapes)

    assert limits(4, SHAPES) == []
    assert "8 bits is loaded on CUDA only" in limits(8, SHAPES)[0]
    (reason,) = limits(4, {"layers.0.o_proj": (48, 64)})
    assert "out_features 48 of layers.0.o_proj is not a multiple of 32, which vLLM's CPU kernel needs" in reason
    # q, k and v run as one linear: 64 + 16 + 16 is a multiple of 32.
    fused = {f"layers.0.{name}_proj": (rows, 64) for name, rows in (("q", 64), ("k", 16), ("v", 16))}
    assert limits(4, fused) == []


def test_limits_of_cuda() -> None:
    def limits(format: str, group_size: int) -> list[str]:
        return cpu_only(format, bits=4, group_size=group_size, symmetric=False, shapes=SHAPES)

    assert limits("awq", 64) == limits("compressed-tensors", -1) == []
    assert "no fast kernel" in limits("awq", 192)[0]
    assert "may find no kernel" in limits("compressed-tensors", 192)[0]
