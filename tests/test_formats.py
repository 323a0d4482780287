"""Formats against literal words, scalar loops from the description, and other tools, byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats import (
    FORMATS,
    Grid,
    QuantizedWeight,
    dequantize,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
)


def random_quantized(
    seed: int,
    *,
    out_features: int = 16,
    in_features: int = 32,
    group_size: int = 8,
    bits: int = 4,
    symmetric: bool = False,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits
    integers_OI = torch.randint(0, top, (out_features, in_features), generator=generator).to(torch.uint8)
    groups = in_features // group_size
    scale_OG = (torch.rand(out_features, groups, generator=generator) + 0.001).half().float()
    zero_point_OG = torch.randint(0, top, (out_features, groups), generator=generator, dtype=torch.int32)
    if symmetric:
        zero_point_OG.fill_(top // 2)
    return QuantizedWeight(integers_OI, Grid(scale_OG, zero_point_OG, bits, group_size, symmetric))


def by_hand(integers: list[list[int]], zero_points: list[list[int]], symmetric: bool) -> QuantizedWeight:
    zero_point_OG = torch.tensor(zero_points, dtype=torch.int32)
    grid = Grid(torch.ones(zero_point_OG.shape), zero_point_OG, 4, len(integers[0]) // len(zero_points[0]), symmetric)
    return QuantizedWeight(torch.tensor(integers, dtype=torch.uint8), grid)


def words(packed: Tensor) -> list[list[str]]:
    """Each int32 as 8 hexadecimal digits, the last of which is its slot 0."""
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in packed.tolist()]


def assert_same(got: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert got.integers_OI.dtype == torch.uint8 and torch.equal(got.integers_OI, expected.integers_OI)
    assert got.grid.scale_OG.dtype == torch.float32 and torch.equal(got.grid.scale_OG, expected.grid.scale_OG)
    assert got.grid.zero_point_OG.dtype == torch.int32
    assert torch.equal(got.grid.zero_point_OG, expected.grid.zero_point_OG)
    assert (got.grid.bits, got.grid.group_size) == (expected.grid.bits, expected.grid.group_size)
    assert torch.equal(dequantize(got), dequantize(expected))


# Literal words.


def test_awq_words_by_hand() -> None:
    # One input, eight outputs: integers 0..7, zero points 1..8. Slots hold columns 0 2 4 6 1 3 5 7, lowest
    # digit first.
    quantized = by_hand([[column] for column in range(8)], [[column + 1] for column in range(8)], False)
    tensors = pack_awq(quantized)
    assert words(tensors["qweight"]) == [["75316420"]]
    assert words(tensors["qzeros"]) == [["86427531"]]
    assert tensors["scales"].tolist() == [[1.0] * 8]


def test_awq_symmetric_words_by_hand() -> None:
    quantized = by_hand([[15]] * 8, [[8]] * 8, True)
    assert words(pack_awq(quantized)["qweight"]) == [["ffffffff"]]
    assert words(pack_awq(quantized)["qzeros"]) == [["88888888"]]


def test_gptq_words_by_hand() -> None:
    # Eight inputs, eight outputs: integers 0..7 along the inputs; zero points 1..8, of which one less is
    # stored.
    quantized = by_hand([list(range(8))] * 8, [[column + 1] for column in range(8)], False)
    tensors = pack_gptq(quantized)
    assert words(tensors["qweight"]) == [["76543210"] * 8]
    assert words(tensors["qzeros"]) == [["76543210"]]
    assert tensors["g_idx"].tolist() == [0] * 8 and tensors["g_idx"].dtype == torch.int32


def test_gptq_symmetric_words_by_hand() -> None:
    tensors = pack_gptq(by_hand([[8] * 16] * 8, [[8, 8]] * 8, True))
    assert words(tensors["qweight"]) == [["88888888"] * 8] * 2
    assert words(tensors["qzeros"]) == [["77777777"]] * 2  # 8 - 1, as every GPTQ v1 file has it
    assert tensors["g_idx"].tolist() == [0] * 8 + [1] * 8


def test_gptq_zero_point_0_is_stored_as_15() -> None:
    quantized = by_hand([[8] * 8] * 8, [[0]] * 8, False)
    tensors = pack_gptq(quantized)
    assert words(tensors["qzeros"]) == [["ffffffff"]]
    assert_same(unpack_gptq(tensors, bits=4, group_size=8), quantized)


def test_compressed_tensors_words_by_hand() -> None:
    # Zero points 0..7 along the outputs, stored as they are.
    quantized = by_hand([list(range(8, 16))] * 8, [[column] for column in range(8)], False)
    tensors = pack_compressed_tensors(quantized)
    assert words(tensors["weight_packed"]) == [["fedcba98"]] * 8
    assert words(tensors["weight_zero_point"]) == [["76543210"]]
    assert tensors["weight_scale"].tolist() == [[1.0]] * 8
    assert tensors["weight_shape"].tolist() == [8, 8] and tensors["weight_shape"].dtype == torch.int64


def test_compressed_tensors_symmetric_has_no_zero_points() -> None:
    quantized = by_hand([list(range(8))] * 3, [[8]] * 3, True)
    assert set(pack_compressed_tensors(quantized)) == {"weight_packed", "weight_scale", "weight_shape"}


def test_compressed_tensors_asymmetric_keeps_zero_points_that_are_all_8() -> None:
    # A config that says asymmetric promises the tensor; an engine without it would take zero points for 0.
    quantized = by_hand([list(range(8))] * 8, [[8]] * 8, False)
    assert words(pack_compressed_tensors(quantized)["weight_zero_point"]) == [["88888888"]]


# Scalar loops, straight from the layouts' description.


def put(word: Tensor, slot: int, value: int, bits: int = 4) -> None:
    """Writes one integer into a 0-dimensional int64 tensor that stands for an unsigned word."""
    word += value << (slot * bits)


def as_int32(word_matrix: Tensor) -> Tensor:
    return torch.where(word_matrix >= 2**31, word_matrix - 2**32, word_matrix).int()


def test_awq_equals_scalar_loops() -> None:
    quantized = random_quantized(0)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight, qzeros = torch.zeros(32, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
    for word in range(2):
        for slot in range(8):
            column = 8 * word + order[slot]
            for i in range(32):
                put(qweight[i, word], slot, int(quantized.integers_OI[column, i]))
            for group in range(4):
                put(qzeros[group, word], slot, int(quantized.grid.zero_point_OG[column, group]))
    tensors = pack_awq(quantized)
    assert torch.equal(tensors["qweight"], as_int32(qweight))
    assert torch.equal(tensors["qzeros"], as_int32(qzeros))
    assert torch.equal(tensors["scales"], quantized.grid.scale_OG.T.half())


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_equals_scalar_loops(bits: int) -> None:
    quantized = random_quantized(1, bits=bits)
    slots = 32 // bits
    qweight = torch.zeros(32 // slots, 16, dtype=torch.int64)
    qzeros = torch.zeros(4, 16 // slots, dtype=torch.int64)
    for column in range(16):
        for i in range(32):
            put(qweight[i // slots, column], i % slots, int(quantized.integers_OI[column, i]), bits)
        for group in range(4):
            stored = (int(quantized.grid.zero_point_OG[column, group]) - 1) % 2**bits
            put(qzeros[group, column // slots], column % slots, stored, bits)
    tensors = pack_gptq(quantized)
    assert torch.equal(tensors["qweight"], as_int32(qweight))
    assert torch.equal(tensors["qzeros"], as_int32(qzeros))
    assert torch.equal(tensors["scales"], quantized.grid.scale_OG.T.half())


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_equals_scalar_loops(bits: int) -> None:
    quantized = random_quantized(2, bits=bits)
    slots = 32 // bits
    packed = torch.zeros(16, 32 // slots, dtype=torch.int64)
    zero_points = torch.zeros(16 // slots, 4, dtype=torch.int64)
    for column in range(16):
        for i in range(32):
            put(packed[column, i // slots], i % slots, int(quantized.integers_OI[column, i]), bits)
        for group in range(4):
            zero_point = int(quantized.grid.zero_point_OG[column, group])
            put(zero_points[column // slots, group], column % slots, zero_point, bits)
    tensors = pack_compressed_tensors(quantized)
    assert torch.equal(tensors["weight_packed"], as_int32(packed))
    assert torch.equal(tensors["weight_zero_point"], as_int32(zero_points))


# Other tools' packers.


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_equals_its_own_library(bits: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    quantized = random_quantized(3, bits=bits)
    offset = 2 ** (bits - 1)
    signed_OI = (quantized.integers_OI.int() - offset).to(torch.int8)
    signed_zero_point_OG = (quantized.grid.zero_point_OG - offset).to(torch.int8)
    tensors = pack_compressed_tensors(quantized)
    assert torch.equal(tensors["weight_packed"], library.pack_to_int32(signed_OI, bits))
    assert torch.equal(tensors["weight_zero_point"], library.pack_to_int32(signed_zero_point_OG, bits, packed_dim=0))


def test_awq_reads_the_same_in_the_converter_of_compressed_tensors() -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    quantized = random_quantized(4)
    converter = converters.AutoAWQConverter(bits=4, group_size=8)
    named = {f"model.q_proj.{name}": tensor for name, tensor in pack_awq(quantized).items()}
    converted = converter.process(named)
    for name, tensor in pack_compressed_tensors(quantized).items():
        assert torch.equal(converted[f"model.q_proj.{name}"], tensor), name


def test_awq_and_gptq_equal_the_packers_of_vllm() -> None:
    library = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    quantized = random_quantized(5)
    integers_IO = quantized.integers_OI.T.int()
    zero_point_GO = quantized.grid.zero_point_OG.T
    assert torch.equal(pack_awq(quantized)["qweight"], library.awq_pack(integers_IO, 4, 32, 16))
    assert torch.equal(pack_awq(quantized)["qzeros"], library.awq_pack(zero_point_GO, 4, 4, 16))
    assert torch.equal(pack_gptq(quantized)["qweight"], library.gptq_pack(integers_IO, 4, 32, 16))
    stored_GO = (zero_point_GO - 1) % 16
    assert torch.equal(pack_gptq(quantized)["qzeros"], library.pack_cols(stored_GO, 4, 4, 16))
    wide = random_quantized(6, bits=8)
    wide_IO = wide.integers_OI.T.int()
    assert torch.equal(pack_gptq(wide)["qweight"], library.gptq_pack(wide_IO, 8, 32, 16))


# Round trips.


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    bits=st.sampled_from([4, 8]),
    out_eights=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_eights=st.integers(1, 4),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpack_inverts_pack(
    name: str, bits: int, out_eights: int, groups: int, group_eights: int, symmetric: bool, seed: int
) -> None:
    bits = 4 if name == "awq" else bits
    group_size = 8 * group_eights
    quantized = random_quantized(
        seed,
        out_features=8 * out_eights,
        in_features=group_size * groups,
        group_size=group_size,
        bits=bits,
        symmetric=symmetric,
    )
    tensors = FORMATS[name].pack(quantized)
    assert set(FORMATS[name].tensors) == set(tensors) - {"weight_zero_point"}
    assert all(tensor.is_contiguous() for tensor in tensors.values())  # as safetensors needs them
    assert_same(FORMATS[name].unpack(tensors, bits=bits, group_size=group_size), quantized)
    if groups == 1:
        assert_same(FORMATS[name].unpack(tensors, bits=bits, group_size=-1), quantized)
    if symmetric or name == "compressed-tensors":
        got = FORMATS[name].unpack(tensors, bits=bits, group_size=group_size)
        assert got.grid.symmetric == symmetric


def test_wrong_tensors_are_named() -> None:
    quantized = random_quantized(7)
    with pytest.raises(ValueError, match="in groups of 16 do not go with scales"):
        unpack_awq(pack_awq(quantized), bits=4, group_size=16)
    shuffled = pack_gptq(quantized)
    shuffled["g_idx"] = shuffled["g_idx"].flip(0)
    with pytest.raises(ValueError, match="g_idx is out of order"):
        unpack_gptq(shuffled, bits=4, group_size=8)
    del shuffled["g_idx"]
    assert_same(unpack_gptq(shuffled, bits=4, group_size=8), quantized)
    grouped = pack_compressed_tensors(quantized)
    with pytest.raises(ValueError, match="weight_shape"):
        unpack_compressed_tensors({**grouped, "weight_shape": torch.tensor([16, 40])}, bits=4, group_size=8)
    with pytest.raises(ValueError, match="weight_g_idx"):
        unpack_compressed_tensors({**grouped, "weight_g_idx": torch.zeros(32)}, bits=4, group_size=8)
    with pytest.raises(ValueError, match="int32"):
        unpack_compressed_tensors({**grouped, "weight_packed": grouped["weight_packed"].long()}, bits=4, group_size=8)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="stores 4 bits, not 8"):
        pack_awq(random_quantized(8, bits=8))
    with pytest.raises(ValueError, match="out_features 12 is not divisible by 8"):
        pack_awq(random_quantized(8, out_features=12))
    with pytest.raises(ValueError, match="in_features 36 is not divisible by 8"):
        pack_gptq(random_quantized(8, in_features=36, group_size=36))
    quantized = random_quantized(8)
    inexact = quantized.grid._replace(scale_OG=quantized.grid.scale_OG + 1e-7)
    for name, format in FORMATS.items():
        with pytest.raises(ValueError, match="float16"):
            format.pack(QuantizedWeight(quantized.integers_OI, inexact))
        assert name


def test_bfloat16_scales_of_other_tools_are_read() -> None:
    tensors = pack_compressed_tensors(random_quantized(9))
    tensors["weight_scale"] = tensors["weight_scale"].bfloat16()
    grid = unpack_compressed_tensors(tensors, bits=4, group_size=8).grid
    assert grid.scale_OG.dtype == torch.float32
    assert torch.equal(grid.scale_OG, tensors["weight_scale"].float())
