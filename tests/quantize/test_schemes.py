"""Patterns to schemes: what matches, what is refused, and that a checkpoint with several is what was asked for."""

from pathlib import Path

import pytest
import torch

from quantkit import formats, tokens
from quantkit.architecture import Architecture, layer_prefix, linear_shapes
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.formats import Storage
from quantkit.progress import silent
from quantkit.quantize import allocate, stream
from quantkit.quantize.layer import Settings
from quantkit.quantize.schemes import Override, plan

USUAL = Storage("compressed-tensors", 4, 32, False)


@pytest.fixture(scope="module")
def arch(tiny_llama: Path) -> Architecture:
    return open_checkpoint(tiny_llama).arch


def test_the_last_override_wins_and_what_is_ignored_stays_so(arch: Architecture) -> None:
    found = plan(
        arch,
        USUAL,
        ignore=("model.layers.1.mlp.down_proj",),
        overrides=(
            Override("*.down_proj", bits=8, symmetric=True),
            Override(r"re:model\.layers\.0\.mlp\.down_proj", group_size=64),
            Override("*.o_proj", bits=4),  # as everywhere: nothing special
        ),
    )
    assert dict(found.special) == {
        "model.layers.0.mlp.down_proj": Storage("compressed-tensors", 4, 64, False),
        "model.layers.1.mlp.down_proj": None,
    }
    assert found.of("model.layers.0.self_attn.o_proj") == USUAL


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"ignore": ("*.down",)}, r"ignore '\*.down' matches no linear"),
        ({"overrides": (Override("model.layers.7.*", bits=8),)}, "override 'model.layers.7"),
        ({"ignore": ("*.q_proj",)}, "q_proj, k_proj, v_proj of layer 0 are one linear"),
        ({"overrides": (Override("*.gate_proj", bits=8),)}, "gate_proj, up_proj of layer 0 are one linear"),
        ({"ignore": ("*",)}, "all linears are ignored"),
        ({"usual": USUAL._replace(format="awq"), "overrides": (Override("*.o_proj", bits=8),)}, "awq stores all"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], reason: str, arch: Architecture) -> None:
    with pytest.raises(QuantkitError, match=reason):
        plan(arch, **{"usual": USUAL, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "effort", "choices"),
    [
        ("compressed-tensors", "default", None), ("gptq", "fast", None), ("awq", "default", None),
        ("compressed-tensors", "fast", (4, 16)), ("gptq", "fast", (8, 4)),
    ],
)  # fmt: skip
def test_bits_auto_spends_what_it_may(
    format: str,
    effort: str,
    choices: tuple[int, ...] | None,
    tiny_llama: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """Within the budget, with what a pattern asked for left as it is; a second run finds what the first one chose."""
    source = open_checkpoint(tiny_llama)
    windows = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=6, length=64, seed=0)
    settings = Settings.of(
        effort=effort, format=format, bits="auto", average_bits=7.0, group_size=32, symmetric=format == "gptq",
        act_order=True, damping=0.01, ignore=("*.0.mlp.down_proj",), bit_choices=choices,
    )  # fmt: skip
    allowed = choices or allocate.CHOICES[format]
    layers, out = tmp_path / "layers", tmp_path / "out"
    out.mkdir()
    stream.quantize_layers(source, windows, settings, folder=layers, device="cpu", report=silent)
    limits = stream.check_settings(source, settings)
    assert any("8 bits is loaded on CUDA only" in limit for limit in limits) == (8 in allowed)
    chosen = stream.allocation(layers)
    assert chosen is not None and 6 < chosen["average_bits"] <= 7
    assert not list(layers.glob("fisher-*"))
    stream.write_checkpoint(source, settings, folder=layers, out=out)
    stored = open_checkpoint(out, quantized=True).storages
    assert stored is not None and stored.of("model.layers.0.mlp.down_proj") is None
    weights = spent = 0
    for index in range(source.arch.num_layers):
        for linear, (rows, columns) in linear_shapes(source.arch).items():
            storage = stored.of(layer_prefix(index) + linear)
            weights += rows * columns
            spent += rows * columns * (storage.bits if storage else 16)
    assert spent / weights == pytest.approx(chosen["average_bits"])
    bits = {bits for entry in chosen["groups"] for bits in [entry["bits"]]}
    assert len(bits) > 1 and 4 in bits and bits <= set(allowed)
    assert all({int(each) for each in entry["cost_nats"]} == set(allowed) for entry in chosen["groups"])
    assert stream.settled(settings, layers).average_bits is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"format": "awq", "bit_choices": (4, 8)}, "awq stores no linear in 8 bits .* 4, 16, or the format compressed"),
        ({"average_bits": 5.0, "ignore": ("*.mlp.*",)}, "average_bits 5 is less than the 11.2"),
        ({"average_bits": 4.5, "overrides": ({"match": "*.o_proj", "bits": 8, "symmetric": True},)}, None),
    ],
)
def test_bits_auto_that_cannot_be_is_refused_before_the_work(
    given: dict[str, object], reason: str | None, tiny_llama: Path
) -> None:
    usual = {"format": "compressed-tensors", "average_bits": 6.0, "group_size": 32, "symmetric": False}
    settings = Settings.of(
        effort="default",
        bits="auto",
        act_order=True,
        damping=0.01,
        **usual | given,
    )
    if reason is None:
        stream.check_settings(open_checkpoint(tiny_llama), settings)
        return
    with pytest.raises(QuantkitError, match=reason):
        stream.check_settings(open_checkpoint(tiny_llama), settings)


@pytest.mark.parametrize("effort", ["fast", "default", "high"])
@pytest.mark.parametrize(("format", "symmetric"), [("compressed-tensors", False), ("gptq", True), ("awq", False)])
def test_a_checkpoint_with_several_schemes(
    effort: str, format: str, symmetric: bool, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each linear has the scheme asked for, and the whole is nearer to the original than without the 16-bit ones."""
    source = open_checkpoint(tiny_llama)
    windows = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=6, length=64, seed=0)
    scheme = {"format": format, "bits": 4, "group_size": 32, "symmetric": symmetric, "act_order": True, "damping": 0.01}
    ignore = ("model.layers.0.self_attn.[qkv]_proj", "*.1.mlp.gate_proj", "*.1.mlp.up_proj")
    overrides = () if format == "awq" else ({"match": "*.down_proj", "bits": 8, "symmetric": True},)
    settings = Settings.of(effort=effort, ignore=ignore, overrides=overrides, **scheme)
    layers, out = tmp_path / "layers", tmp_path / "out"
    out.mkdir()
    notes = stream.quantize_layers(source, windows, settings, folder=layers, device="cpu", report=silent)
    stream.write_checkpoint(source, settings, folder=layers, out=out)

    opened = open_checkpoint(out, quantized=True)
    assert opened.storages is not None
    dense, shapes = 0, linear_shapes(source.arch)
    for index in range(source.arch.num_layers):
        made, original = opened.layer(index), source.layer(index)
        for linear in shapes:
            name = layer_prefix(index) + linear
            weight, before = made[f"{linear}.weight"], original[f"{linear}.weight"]
            if opened.storages.of(name) is None:
                dense += 1
                assert f"{name}.weight" in opened.shards
                if effort == "fast":  # otherwise they may have taken in a scale
                    assert torch.equal(weight, before.half().float())
            elif effort == "fast":
                relative = float((weight - before).norm() / before.norm())
                bits = 8 if format != "awq" and linear == "mlp.down_proj" else 4
                assert relative < (0.02 if bits == 8 else 0.3)
                levels = formats.grouped(weight, 32).sort(-1).values.unique_consecutive(dim=-1).shape[-1]
                assert levels > 16 or bits == 4
    assert dense == 5
    assert {note.linear for note in notes} == {
        layer_prefix(index) + linear
        for index in range(source.arch.num_layers)
        for linear in shapes
        if opened.storages.of(layer_prefix(index) + linear) is not None
    }
