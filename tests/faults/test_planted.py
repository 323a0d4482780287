"""Faults planted on purpose, each by name, and which question finds it: an evaluation's, a bundle's, or a check's.

Each is planted before anything is measured, in files that say of themselves that all is well, and the same files
without it pass the same question.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import artifacts, formats
from quantkit.errors import QuantkitError
from quantkit.serve import bundle as bundles
from quantkit.serve import check
from quantkit.speculation import Load, Option, Plan, summary

Tensors = dict[str, Tensor]
FIRST, SECOND = "model.layers.0.", "model.layers.1."
DOWN = f"{SECOND}mlp.down_proj"
LIMITS = {"kl": 0.6, "perplexity_drift": 1.0}  # several times what 4 bits do to these random weights
_CALIBRATION, _HELD_OUT = "calibration.txt", "held_out.txt"


class Made(NamedTuple):
    """An original, its quantized checkpoints by format, and what else is bundled with one of them."""

    folder: Path
    words: Callable[..., Any]  # the command line

    @property
    def original(self) -> Path:
        return self.folder / "original"

    @property
    def stranger(self) -> Path:
        return self.folder / "stranger"


@pytest.fixture(scope="module")
def made(make_llama, quantkit, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("planted")
    for name, seed in (("original", 0), ("stranger", 7)):
        make_llama(folder / name, seed=seed)
        _change(folder / name, _uneven_norms)
    make_llama(folder / "tied", tie_word_embeddings=True)
    for source, name in zip(texts, (_CALIBRATION, _HELD_OUT), strict=True):
        shutil.copy(source, folder / name)
    found = Made(folder, quantkit)
    asked = [
        "--calibration",
        folder / _CALIBRATION,
        "--samples",
        8,
        "--length",
        64,
        "--group-size",
        32,
        "--effort",
        "fast",
    ]
    for format_, more in {
        "compressed-tensors": ["--kv-cache", "fp8"], "gptq": ["--format", "gptq", "--symmetric"],
        "awq": ["--format", "awq"], "symmetric": ["--symmetric"], "of-tied": [],
    }.items():  # fmt: skip
        source = folder / ("tied" if format_ == "of-tied" else "original")
        done = quantkit("quantize", source, "--out", folder / format_, *asked, *more)
        assert done.exit_code == 0, done.output
    limits = folder / "limits.yaml"
    limits.write_text(yaml.safe_dump(LIMITS))
    return found


def _uneven_norms(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = tensor * (0.6 + 0.8 * torch.rand(tensor.shape, generator=generator))


def _change(checkpoint: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a single-file checkpoint; a new file, as the old one may be linked."""
    path = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.unlink()
    path.write_text(json.dumps(data))


def _scheme(config: dict[str, Any]) -> dict[str, Any]:
    scheme: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return scheme


# --- an evaluation finds it ------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """A fault in a candidate of a format: how it is planted, what the evaluation says, and with which exit code."""

    format: str
    plant: Callable[[Path, Made], object]
    said: str
    code: int = 2


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path, Made], None]:
    return lambda candidate, made: _change(candidate, change)


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Made], None]:
    return lambda candidate, made: _json(candidate / "config.json", change)


def _nibbles(each: Tensors) -> None:
    """The first of two integers in a byte where the second should be."""
    name = f"{DOWN}.weight_packed"
    packed = each[name]
    each[name] = ((packed & 0x0F0F0F0F) << 4) | ((packed >> 4) & 0x0F0F0F0F)


def _uninterleaved(each: Tensors) -> None:
    """AWQ's integers in plain order, as every other format has them."""
    name = f"{DOWN}.qweight"
    each[name] = formats._pack(formats._awq_restored(formats._unpack(each[name], 4)), 4, "out_features")


def _integers_of_another_axis(each: Tensors) -> None:
    """Packed along the rows, as GPTQ does, and read along the columns."""
    name = f"{SECOND}self_attn.q_proj.weight_packed"
    each[name] = formats._pack(formats._unpack(each[name], 4).T.contiguous(), 4, "in_features")


def _zero_points_off_by_one(each: Tensors) -> None:
    for name in [name for name in each if name.endswith("weight_zero_point")]:
        points = formats._unpack(each[name].T.contiguous(), 4).int()
        each[name] = formats._pack((points - 1) % 16, 4, "out_features").T.contiguous()


def _scales_of_two_groups(each: Tensors) -> None:
    for name in [name for name in each if name.endswith("down_proj.weight_scale")]:
        each[name] = each[name].roll(1, 1)


def _rows_of_scales(each: Tensors) -> None:
    name = f"{DOWN}.weight_scale"
    each[name] = each[name].flip(0)


def _layers_shuffled(each: Tensors) -> None:
    for name in [name for name in each if name.startswith(FIRST)]:
        other = name.replace(FIRST, SECOND)
        each[name], each[other] = each[other], each[name]


def _swapped(one: str, other: str) -> Callable[[Tensors], None]:
    def swap(each: Tensors) -> None:
        for name in [name for name in each if f".{one}." in name]:
            twin = name.replace(one, other)
            each[name], each[twin] = each[twin], each[name]

    return swap


def _layer_of_a_stranger(candidate: Path, made: Made) -> None:
    """One layer quantized from another checkpoint of the same sizes."""
    other = candidate.with_name("other")
    asked = ["--calibration", made.folder / _CALIBRATION, "--samples", 8, "--length", 64, "--group-size", 32]
    done = made.words("quantize", made.stranger, "--out", other, *asked, "--effort", "fast", "--kv-cache", "fp8")
    assert done.exit_code == 0, done.output
    theirs = load_file(other / "model.safetensors")
    _change(candidate, lambda each: each.update({n: t for n, t in theirs.items() if n.startswith(SECOND)}))


def _of_the_stranger(*names: str) -> Callable[[Path, Made], None]:
    def plant(candidate: Path, made: Made) -> None:
        theirs = load_file(made.stranger / "model.safetensors")
        _change(candidate, lambda each: each.update({name: theirs[name].half() for name in names}))

    return plant


def _norms_lost(each: Tensors) -> None:
    each.update({name: torch.ones_like(tensor) for name, tensor in each.items() if name.endswith("norm.weight")})


def _untied(candidate: Path, made: Made) -> None:
    """A head of its own where the original's is its embedding: not the embedding, though."""
    _json(candidate / "config.json", lambda data: data.update(tie_word_embeddings=False))
    _change(candidate, lambda each: each.update({"lm_head.weight": each["model.embed_tokens.weight"].flip(0)}))


def _adds_bos(data: dict[str, Any]) -> None:
    data["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip


def _two_tokens_swapped(data: dict[str, Any]) -> None:
    words = data["model"]["vocab"]
    words["\u0120"], words[","] = words[","], words["\u0120"]  # a space, and a comma


def _truncated(candidate: Path, made: Made) -> None:
    path = candidate / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) * 3 // 4])


def _manifest(change: Callable[[dict[str, Any]], object], format_: str = "compressed-tensors") -> Any:
    """With its manifest, changed."""

    def plant(candidate: Path, made: Made) -> None:
        shutil.copy(made.folder / format_ / artifacts.MANIFEST_NAME, candidate)
        _json(candidate / artifacts.MANIFEST_NAME, change)

    return plant


def _calibrated_on_the_held_out_text(candidate: Path, made: Made) -> None:
    """The same words under another name, and not the same file: a title before them."""
    leaked = candidate.with_name("leaked.txt")
    leaked.write_text("A title.\n" + (made.folder / _HELD_OUT).read_text())
    _manifest(lambda data: data["settings"]["calibration"].update(text={str(leaked): "0" * 64}))(candidate, made)


def _calibrated_on_the_same_file(candidate: Path, made: Made) -> None:
    same = {str(made.folder / _HELD_OUT): "0" * 64}
    _manifest(lambda data: data["settings"]["calibration"].update(text=same))(candidate, made)


def _without(*ends: str) -> Callable[[Tensors], None]:
    def drop(each: Tensors) -> None:
        for name in [name for name in each if name.endswith(ends)]:
            del each[name]

    return drop


def _shuffled_index(each: Tensors) -> None:
    name = f"{DOWN}.g_idx"
    each[name] = each[name][torch.randperm(len(each[name]), generator=torch.Generator().manual_seed(0))]


CT = "compressed-tensors"
OTHER_WEIGHTS = "holds other weights than the reference's, or holds them in the wrong places"
OTHER_SCALES = "holds its groups at other scales than the reference's"
GATE = "must not be served"
IN_EVALUATION: dict[str, Planted] = {
    "packing: nibbles swapped": Planted(CT, tensors(_nibbles), OTHER_WEIGHTS),
    "packing: AWQ's order left out": Planted("awq", tensors(_uninterleaved), OTHER_WEIGHTS),
    "packing: along the other axis": Planted(CT, tensors(_integers_of_another_axis), OTHER_WEIGHTS),
    "zero points off by one": Planted(CT, tensors(_zero_points_off_by_one), GATE, 8),
    "zero points of gptq v2 read as v1": Planted(
        "gptq", tensors(lambda each: each.update({n: t + 0x11111111 for n, t in each.items() if n.endswith("qzeros")})),
        "zero points of its own, and config.json says symmetric"),
    "scales of two groups swapped": Planted(CT, tensors(_scales_of_two_groups), OTHER_SCALES),
    "scales of other rows": Planted(CT, tensors(_rows_of_scales), OTHER_SCALES),
    "layers shuffled": Planted(CT, tensors(_layers_shuffled), OTHER_WEIGHTS),
    "a layer of another checkpoint": Planted(CT, _layer_of_a_stranger, OTHER_WEIGHTS),
    "q and k swapped": Planted(CT, tensors(_swapped("q_proj", "k_proj")), OTHER_WEIGHTS),
    "gate and up swapped": Planted(CT, tensors(_swapped("gate_proj", "up_proj")), OTHER_WEIGHTS),
    "a scale that is no number": Planted(
        CT, tensors(lambda each: each.update({f"{DOWN}.weight_scale": each[f"{DOWN}.weight_scale"] * float("nan")})),
        OTHER_WEIGHTS),
    "weights of the norms lost": Planted(CT, tensors(_norms_lost), GATE, 8),
    "head of another checkpoint": Planted(CT, _of_the_stranger("lm_head.weight"), GATE, 8),
    "embeddings of another checkpoint": Planted(
        CT, _of_the_stranger("model.embed_tokens.weight"), "the embeddings of 64 tokens differ by"),
    "tied head untied wrongly": Planted("of-tied", _untied, GATE, 8),
    "wrong BOS": Planted(
        CT, lambda c, m: _json(c / "tokenizer.json", _adds_bos), "its tokenizer adds a BOS to a text, the reference's"),
    "two tokens swapped": Planted(
        CT, lambda c, m: _json(c / "tokenizer.json", _two_tokens_swapped), "makes other tokens of the same text"),
    "chat template missing": Planted(
        CT, lambda c, m: (c / "chat_template.jinja").unlink(), "it has no chat template, the reference has one"),
    "chat template of another model": Planted(
        CT, lambda c, m: (c / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        "its chat template is not the reference's"),
    "made from another base": Planted(
        CT, _manifest(lambda data: data["inputs"].update(checkpoint="0" * 64)), "its manifest names another base"),
    "rope theta wrong": Planted(
        CT, config(lambda data: data["rope_parameters"].update(rope_theta=500000.0)), "rotary embeddings are others"),
    "rope scaling left out or added": Planted(
        CT, config(lambda data: data["rope_parameters"].update(rope_type="linear", factor=4.0)),
        "rotary embeddings are others"),
    "epsilon of the norms wrong": Planted(
        CT, config(lambda data: data.update(rms_norm_eps=0.1)), "their configs differ in size or kind"),
    "g_idx shuffled": Planted("gptq", tensors(_shuffled_index), "g_idx is out of order"),
    "group size declared wrong": Planted(
        CT, config(lambda data: _scheme(data).update(group_size=64)), "do not go with scales"),
    "bits declared wrong": Planted(
        CT, config(lambda data: _scheme(data).update(num_bits=8)), "is not stored as config.json says"),
    "symmetric declared for asymmetric": Planted(
        CT, config(lambda data: _scheme(data).update(symmetric=True)), "config.json says symmetric"),
    "asymmetric declared for symmetric": Planted(
        "symmetric", config(lambda data: _scheme(data).update(symmetric=False)), "config.json says asymmetric"),
    "shard truncated": Planted(CT, _truncated, "is truncated or no safetensors file"),
    "scales of a linear missing": Planted(
        CT, tensors(_without("layers.1.mlp.down_proj.weight_scale")), "weight_scale are missing"),
    "norm of a layer missing": Planted(
        CT, tensors(_without("layers.1.input_layernorm.weight")), "is missing: the checkpoint does not match"),
    "KV scales of a layer missing": Planted(
        CT, tensors(_without("layers.1.self_attn.k_scale")), "1 scales are missing"),
    "calibrated on the held-out file": Planted(
        CT, _calibrated_on_the_same_file, "is both calibration and held-out text: the drift would be flattered"),
    "calibrated on the held-out words": Planted(
        CT, _calibrated_on_the_held_out_text, "also stands in the calibration text"),
}  # fmt: skip


def _eval(made: Made, candidate: Path, out: Path, format_: str) -> Any:
    reference = made.folder / ("tied" if format_ == "of-tied" else "original")
    return made.words(
        "eval", candidate, "--reference", reference, "--out", out, "--text", made.folder / _HELD_OUT, "--samples", 24,
        "--length", 64, "--chat", "no", "--profile", made.folder / "limits.yaml",
    )  # fmt: skip


def _copy(made: Made, format_: str, place: Path) -> Path:
    """A candidate that says nothing of where it is from."""
    ignored = shutil.ignore_patterns(artifacts.MANIFEST_NAME)
    return Path(shutil.copytree(made.folder / format_, place / "candidate", ignore=ignored))


@pytest.mark.parametrize("format_", sorted({one.format for one in IN_EVALUATION.values()}))
def test_without_a_fault_the_evaluation_passes(format_: str, made: Made, tmp_path: Path) -> None:
    done = _eval(made, _copy(made, format_, tmp_path), tmp_path / "out", format_)
    assert done.exit_code == 0, done.output
    done = _eval(made, made.folder / format_, tmp_path / "with-manifest", format_)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", IN_EVALUATION)
def test_the_evaluation_finds(name: str, made: Made, tmp_path: Path) -> None:
    planted = IN_EVALUATION[name]
    candidate = _copy(made, planted.format, tmp_path)
    planted.plant(candidate, made)
    done = _eval(made, candidate, tmp_path / "out", planted.format)
    assert done.exit_code == planted.code and planted.said in done.stderr, done.output


# --- a bundle is refused ---------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a bundle is made from."""

    target: Path
    draft: Path
    report: Path


def _stage(place: Path, kind: Any, inputs: Mapping[str, str], results: dict[str, Any], source: Path) -> Path:
    """A stage's folder, with the manifest that the stage would write."""
    with artifacts.making(place, kind, inputs=inputs, settings={}) as work:
        ignored = shutil.ignore_patterns(artifacts.MANIFEST_NAME)
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=ignored)
        work.results |= results
    return place


def _drafted(accepted_length: float) -> dict[str, Any]:
    """The results of a draft that pays, by a plan that counts on this accepted length."""
    options = [Option(tokens=k, speedup=1.5, standard_error=0.05) for k in (1, 2, 3)]
    plan = Plan(
        profile="cpu", origin="measured", machine="here", context_tokens=64, measured_positions=3,
        accepted_length=[1.6, 2.0, accepted_length], accepted_length_standard_error=[0.1, 0.1, 0.1],
        loads=[Load(concurrency=1, step_s=0.01, options=options)],
    )  # fmt: skip
    counted = {"accepted_length": 2.25, "acceptance_rate": 0.417, "per_position": [0.6, 0.4, 0.25], "drafts": 100}
    return {
        "kind": "draft_model", "kept": "after", "speculative_tokens": 3,
        "acceptance": {"after": {"0": {"vllm": counted}}},
    } | summary([plan])  # fmt: skip


@pytest.fixture
def parts(made: Made, tmp_path: Path) -> Parts:
    target = Path(shutil.copytree(made.folder / CT, tmp_path / "target"))
    digest = artifacts.digest(target)
    page = tmp_path / "page"
    page.mkdir()
    (page / "report.json").write_text('{"verdict": "passed"}')
    return Parts(
        target,
        _stage(tmp_path / "draft", "draft", {"target": digest}, _drafted(2.25), made.original),
        _stage(tmp_path / "report", "report", {"candidate": digest}, {"candidates": []}, page),
    )


def _bundle(made: Made, parts: Parts, out: Path, *more: object) -> Any:
    return made.words(
        "serve", "bundle", "--target", parts.target, "--draft", parts.draft, "--report", parts.report, "--out", out,
        "--max-model-len", 512, *more,
    )  # fmt: skip


def _draft_of(results: dict[str, Any], **inputs: str) -> Callable[[Parts, Made], Parts]:
    def plant(parts: Parts, made: Made) -> Parts:
        given = {"target": artifacts.digest(parts.target)} | inputs
        return parts._replace(
            draft=_stage(parts.draft.with_name("another"), "draft", given, results, made.original)
        )  # fmt: skip

    return plant


def _report_of_another(parts: Parts, made: Made) -> Parts:
    page = parts.report.with_name("page")
    return parts._replace(
        report=_stage(parts.report.with_name("another"), "report", {"candidate": "0" * 64}, {"candidates": []}, page)
    )


def _a_bit_of_the_weights(parts: Parts, made: Made) -> Parts:
    path = parts.target / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.unlink()
    path.write_bytes(data)
    return parts


def _edited_report(parts: Parts, made: Made) -> Parts:
    (parts.report / "report.json").write_text('{"verdict": "PASSED"}')
    return parts


def _draft_with_another_tokenizer(parts: Parts, made: Made) -> Parts:
    _json(parts.draft / "tokenizer.json", _two_tokens_swapped)
    return parts


def _token_beyond_the_embedding(parts: Parts, made: Made) -> Parts:
    extra = {"id": 320, "content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}  # fmt: skip
    for role in (parts.target, parts.draft):
        _json(role / "tokenizer.json", lambda data: data["added_tokens"].append(extra))
    return parts


IN_BUNDLING: dict[str, tuple[Callable[[Parts, Made], Parts], str]] = {
    "report of another target": (_report_of_another, "judges another checkpoint than"),
    "draft of another target": (_draft_of(_drafted(2.25), target="0" * 64), "was trained for another target than"),
    "draft's plan forged": (_draft_of(_drafted(3.5)), "counts on an accepted length of 3.5, and vLLM counted 2.25"),
    "draft of another tokenizer": (_draft_with_another_tokenizer, "give 2 tokens different ids"),
    "a bit of the weights flipped": (_a_bit_of_the_weights, "model.safetensors has changed since its manifest"),
    "report edited": (_edited_report, "report.json has changed since its manifest was written"),
    "a token beyond the embedding": (_token_beyond_the_embedding, "beyond the 320 rows of the embedding"),
}


@pytest.mark.parametrize("name", IN_BUNDLING)
def test_the_bundle_is_refused(name: str, made: Made, parts: Parts, tmp_path: Path) -> None:
    plant, said = IN_BUNDLING[name]
    done = _bundle(made, parts, tmp_path / "without")
    assert done.exit_code == 0, done.output
    done = _bundle(made, plant(parts, made), tmp_path / "with")
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert not (tmp_path / "with" / artifacts.MANIFEST_NAME).exists()


def test_a_draft_of_another_target_may_be_wanted(made: Made, parts: Parts, tmp_path: Path) -> None:
    stale = _draft_of(_drafted(2.25), target="0" * 64)(parts, made)
    done = _bundle(made, stale, tmp_path / "out", "--speculate", "always")
    assert done.exit_code == 0 and "was trained for another target" in done.stderr, done.output


# --- `serve check` finds it ------------------------------------------------------------------------------------------


def _kv_scales_of_another_layer(bundle: Path) -> None:
    def swap(each: Tensors) -> None:
        for which in ("k_scale", "v_scale"):
            one, other = (f"{layer}self_attn.{which}" for layer in (FIRST, SECOND))
            each[one], each[other] = each[other], each[one]

    _change(bundle / "target", swap)


def _kv_scales_gone(bundle: Path) -> None:
    _change(bundle / "target", _without("k_scale", "v_scale", "q_scale"))


def _flag(line: str, instead: str) -> Callable[[Path], None]:
    def plant(bundle: Path) -> None:
        path = bundle / "vllm" / "serve.cpu.yaml"
        text = path.read_text()
        assert line in text
        path.write_text(text.replace(line, instead))

    return plant


def _config_of_another(bundle: Path) -> None:
    _json(bundle / "target" / "config.json", lambda data: _scheme(data).update(symmetric=True))


def _draft_removed(bundle: Path) -> None:
    shutil.rmtree(bundle / "draft")


IN_CHECKING: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "KV scales of another layer": (
        _kv_scales_of_another_layer, "bundle.json agrees with the checkpoints", "calibrated was"),
    "KV scales missing": (_kv_scales_gone, "target safe and complete", "scales are missing"),
    "prefix caching turned off": (
        _flag("enable-prefix-caching: true", "no-enable-prefix-caching: true"),
        "bundle.json agrees with the checkpoints", "enable-prefix-caching is None, by bundle.json True"),
    "another length of sequences": (
        _flag("max-model-len: 512", "max-model-len: 1024"), "bundle.json agrees with the checkpoints",
        "max-model-len is 1024, by bundle.json 512"),
    "another scheme declared": (
        _config_of_another, "bundle.json agrees with the checkpoints", "quantization_config differs"),
    "draft removed": (_draft_removed, "draft safe and complete", "names a draft and there is none"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundled")
    target = made.folder / CT
    draft = _stage(place / "draft", "draft", {"target": artifacts.digest(target)}, _drafted(2.25), made.original)
    done = made.words(
        "serve", "bundle", "--target", target, "--draft", draft, "--out", place / "bundle", "--max-model-len", 512
    )
    assert done.exit_code == 0, done.output
    return place / "bundle"


def _failed(bundle: Path) -> dict[str, str]:
    return {one.name: one.detail for one in check.check(bundle, ask_vllm=False) if not one.passed}


@pytest.mark.parametrize("name", IN_CHECKING)
def test_the_check_finds(name: str, bundle: Path, tmp_path: Path) -> None:
    """Whoever planted it made the sums anew; without that they find it first."""
    plant, where, said = IN_CHECKING[name]
    own = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert _failed(own) == {}
    plant(own)
    assert bundles.SUMS_NAME in _failed(own)
    (own / bundles.SUMS_NAME).write_text(bundles.sums_text(own, {}))
    found = _failed(own)
    assert bundles.SUMS_NAME not in found and said in found[where], found


def test_there_are_no_fewer_than_twenty() -> None:
    assert len(IN_EVALUATION) + len(IN_BUNDLING) + len(IN_CHECKING) >= 48


def test_planting_is_not_what_is_found(made: Made, tmp_path: Path) -> None:
    """Reading and writing the files again, with nothing changed, is no fault."""
    candidate = _copy(made, CT, tmp_path)
    _change(candidate, lambda each: None)
    _json(candidate / "config.json", lambda data: None)
    _json(candidate / "tokenizer.json", lambda data: None)
    assert _eval(made, candidate, tmp_path / "out", CT).exit_code == 0
    with pytest.raises(QuantkitError):
        artifacts.digest(tmp_path / "nothing")
