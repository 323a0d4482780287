"""Every format that quantkit reads of somebody else: valid files to start from, and all that is read of them."""

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from quantkit import artifacts, chat_template, speculation, text, tokens
from quantkit import checkpoint as checkpoints
from quantkit import gguf as gguf_files
from quantkit.checkpoint import open_checkpoint, write_weights
from quantkit.errors import QuantkitError
from quantkit.recipe import load_recipe
from quantkit.shards import held
from tests.conftest import write_tiny_llama
from tests.hostile import mutations

Mutate = Callable[[Random], bytes]


class Case(NamedTuple):
    """A file to be made hostile, what makes it so, and what then reads it."""

    file: Path
    mutate: Mutate
    read: Callable[[Random], None]


def _tiny(folder: Path, **config: Any) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64, "num_key_value_heads": 1}
    return write_tiny_llama(folder, layers=1, vocab_size=280, kv_heads=1, heads=2, dtype=torch.float16, **(
        {key: value for key, value in sizes.items() if key != "num_key_value_heads"} | config
    ))  # fmt: skip


def _whole(folder: Path, rng: Random) -> None:
    """All that is asked of a checkpoint before a run, and some of its weights."""
    from quantkit.capacity import sizing

    opened = open_checkpoint(folder)
    sizing.size(folder, kv_cache_bytes=1 << 20)
    checkpoints.check_finite(opened)
    if opened.storages is None:
        opened.layer(0)


def safetensors(folder: Path) -> Case:
    """model.safetensors: its length, its header, its bytes."""
    made = _tiny(folder / "model")
    file = made / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    def mutate(rng: Random) -> bytes:
        kind = rng.randrange(8)
        if kind == 0:
            return mutations.noise(rng)
        if kind == 1:
            return mutations.damaged(rng, data)
        text = mutations.as_json(rng, header)
        said = len(text) if kind < 7 else rng.choice([0, 1, 1 << 20, 1 << 31, 1 << 60, (1 << 64) - 1, len(text) + 1])
        return struct.pack("<Q", said) + text + (rest if rng.randrange(8) else rest[: rng.randrange(len(rest))])

    return Case(file, mutate, lambda rng: _whole(made, rng))


def index(folder: Path) -> Case:
    """model.safetensors.index.json, with its weight_map."""
    made = _tiny(folder / "model")
    tensors = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    write_weights(made, [held(name, tensor) for name, tensor in tensors.items()], shard_bytes=8000)
    file = made / checkpoints.INDEX_NAME
    valid = json.loads(file.read_bytes())
    return Case(file, lambda rng: _json(rng, valid), lambda rng: _whole(made, rng))


def config(folder: Path) -> Case:
    """config.json, of a dense checkpoint and with what each quantizer writes into it."""
    from quantkit import decoder
    from quantkit.capacity import sizing, subject, weights

    made = _tiny(folder / "model")
    file = made / "config.json"
    dense = json.loads(file.read_bytes())
    layer = "model.layers.0.self_attn.q_proj"
    group = {
        "targets": ["Linear", f"re:.*{layer}$"], "input_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16},
    }  # fmt: skip
    ways = [
        None,
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": {f"-:{layer}": {}, "+:x": {"bits": 8}}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
         "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "packing_format": "auto_round:auto_gptq"},
    ]  # fmt: skip
    ropes = [
        {},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, "transformer_layer_config": dense},
    ]  # fmt: skip

    def mutate(rng: Random) -> bytes:
        valid = dense | rng.choice(ropes)
        way = rng.choice(ways)
        return _json(rng, valid | ({"quantization_config": way} if way else {}))

    def read(rng: Random) -> None:
        read_config = sizing.read_config(made)
        sizing.speculative_method(read_config)
        model = weights.open_model(made)
        decoder.rotation(read_config, 8, dtype=torch.float32, device="cpu")
        if rng.randrange(20) == 0:
            subject.plan(made, gpu="h100-80gb", given={})
        del model
        _whole(made, rng)

    return Case(file, mutate, read)


def write_gguf(path: Path) -> Path:
    """A Llama of one layer as GGUF, with a byte-level tokenizer: transformers converts it."""
    writer = gguf.GGUFWriter(path, "llama")
    hidden, inner, heads = 32, 64, 2
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    merges = ["t h", "th e", "a n"]
    words = ["<s>", "</s>", *letters, *(merge.replace(" ", "") for merge in merges)]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    shapes = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
              "ffn_down": (hidden, inner)}  # fmt: skip
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
    named = {"token_embd": (len(words), hidden), "output_norm": (hidden,), "output": (len(words), hidden)}
    for name, shape in (named | {f"blk.0.{name}": shape for name, shape in shapes.items()}).items():
        kind = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_file(folder: Path) -> Case:
    """A GGUF file; of those whose beginning is in order, one in fifty is converted."""
    file = write_gguf(folder / "model.gguf")
    data = file.read_bytes()
    begin = data.rindex(b"weight") + 64  # behind the last of what is said of tensors

    def mutate(rng: Random) -> bytes:
        kind = rng.randrange(10)
        if kind == 0:
            return mutations.noise(rng)
        if kind == 1:
            return mutations.damaged(rng, data)
        if kind == 2:
            return data[: rng.randrange(len(data))]
        if kind == 3:  # what is said of counts
            counts = struct.pack("<IQQ", rng.choice([0, 1, 2, 3, 4, 1 << 31]), *rng.choices(_COUNTS, k=2))
            return data[:4] + counts + data[24:]
        if kind < 7:  # one number of those before the tensors
            at = rng.randrange(24, begin - 8)
            form = rng.choice("QI")
            new = struct.pack(f"<{form}", rng.choice(_COUNTS) & ((1 << 8 * struct.calcsize(form)) - 1))
            return data[:at] + new + data[at + len(new) :]
        return mutations.damaged(rng, data[:begin]) + data[begin:]

    def read(rng: Random) -> None:
        gguf_files.find_gguf(str(file))
        if rng.randrange(50):
            found = gguf_files.problems(file)
            checkpoints.raise_all(found)
            return
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        gguf_files.convert_gguf(file, out)
        open_checkpoint(out)

    return Case(file, mutate, read)


_COUNTS = [0, 1, 2, 31, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]


def _tokenizer_file(folder: Path, name: str) -> Case:
    made = _tiny(folder / "model")
    file = made / name
    valid = json.loads(file.read_bytes())

    def read(rng: Random) -> None:
        tokenizer = tokens.load_tokenizer(made)
        tokenizer("The harbour of the town, 17 + 25 = 42 \n\u00e9")
        checkpoints.copy_companions(made, folder)

    return Case(file, lambda rng: _json(rng, valid), read)


def tokenizer_json(folder: Path) -> Case:
    """tokenizer.json, loaded and put to work."""
    return _tokenizer_file(folder, "tokenizer.json")


def tokenizer_config(folder: Path) -> Case:
    """tokenizer_config.json, loaded with what it names."""
    return _tokenizer_file(folder, "tokenizer_config.json")


class _Spoken:
    """A tokenizer as far as a chat template sees one."""

    def __init__(self, file: Path) -> None:
        self.file, self.special_tokens_map = file, {"bos_token": "<s>", "eos_token": "</s>"}

    def get_chat_template(self) -> str:
        return self.file.read_text(encoding="utf-8", errors="replace")


def chat(folder: Path) -> Case:
    """A chat template in Jinja, rendered."""
    from tests.conftest import CHAT_TEMPLATE

    file = folder / "chat_template.jinja"
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    return Case(
        file, lambda rng: mutations.template(rng, CHAT_TEMPLATE).encode("utf-8", errors="replace"),
        lambda rng: void(chat_template.render(_Spoken(file), said, add_generation_prompt=True)),
    )  # fmt: skip


def recipe(folder: Path) -> Case:
    """A recipe, and a profile of limits."""
    file = folder / "recipe.yaml"
    valid = (Path(__file__).parents[2] / "recipes" / "quickstart.yaml").read_text()
    valid = "\n".join(line.split("  #")[0] for line in valid.splitlines() if not line.lstrip().startswith("#"))

    def mutate(rng: Random) -> bytes:
        return mutations.noise(rng) if rng.randrange(20) == 0 else mutations.yaml_lines(rng, valid)

    return Case(file, mutate, lambda rng: void(load_recipe(file)))


def jsonl(folder: Path) -> Case:
    """Prompts as JSON lines."""
    file = folder / "prompts.jsonl"
    rows = [{"text": "a"}, {"prompt": "b"}, {"messages": [{"role": "user", "content": "c"}]}]

    def mutate(rng: Random) -> bytes:
        if rng.randrange(10) == 0:
            return mutations.noise(rng)
        data = b"\n".join(_json(rng, row) if rng.randrange(2) else json.dumps(row).encode() for row in rows)
        return mutations.damaged(rng, data) if rng.randrange(10) == 0 else data

    def read(rng: Random) -> None:
        for document in text.documents(str(file)):
            said = [document] if isinstance(document, str) else [turn["content"] for turn in document]
            assert all(each.encode() is not None for each in said)

    return Case(file, mutate, read)


def bundle_json(folder: Path) -> Case:
    """bundle.json; of one in two thousand the whole bundle is checked."""
    from quantkit import summary
    from quantkit.serve import bundle as bundles
    from quantkit.serve import check
    from quantkit.serve.settings import ServeSettings
    from tests.conftest import write_bundle

    made = write_bundle(
        _tiny(folder / "model"), folder / "bundle",
        ServeSettings(served_model_name="tiny", max_model_len=64, num_speculative_tokens=2),
    )  # fmt: skip
    file = made / bundles.BUNDLE_JSON
    valid, whole = json.loads(file.read_bytes()), artifacts.read_manifest(made)

    def read(rng: Random) -> None:
        _print(lambda console: summary.print_artefact(console, made, whole))
        if rng.randrange(2000) == 0:
            check.check(made, ask_vllm=False)

    return Case(file, lambda rng: _json(rng, valid), read)


def engine_result(folder: Path) -> Case:
    """result.json of an engine."""
    from quantkit.engines import contract

    file = folder / "result.json"
    same = {"engine": "x", "version": "1", "method": "gptq", "import_cpu_s": 1.5, "notes": ["a"]}
    kinds: list[tuple[type[contract.AnyResult], dict[str, Any]]] = [
        (contract.Result, same | {"format": "gptq"}),
        (contract.HeadResult, same | {"steps": 1, "epoch_losses": [1.0], "first_token_agreement": 0.5}),
    ]

    def read(rng: Random) -> None:
        refused = []
        for returns, _ in kinds:
            try:
                contract.read_result("x", "gptq", folder, returns)
            except QuantkitError as error:
                refused.append(error)
        if len(refused) == len(kinds):
            raise refused[0]

    return Case(file, lambda rng: _json(rng, rng.choice(kinds)[1]), read)


def manifest(folder: Path) -> Case:
    """quantkit.json of a draft: its plan, its freshness, and what `inspect` shows of it."""
    from quantkit import summary

    made = folder / "draft"
    plan = {
        "profile": "gpu", "origin": "measured", "machine": "x", "context_tokens": 64, "measured_positions": 2,
        "accepted_length": [1.5, 1.8], "accepted_length_standard_error": [0.1, 0.1],
        "loads": [
            {"concurrency": 1, "step_s": 0.01, "options": [{"tokens": 1, "speedup": 1.2, "standard_error": 0.1}]}
        ],
    }  # fmt: skip
    with artifacts.making(made, "draft", inputs={"target": "0" * 64}, settings={"a": {"b": 1}}) as work:
        artifacts.write_text(made / "weights", "x")
        counted = {"acceptance_rate": 0.4, "accepted_length": 1.8, "per_position": [0.5, 0.3]}
        counted["accepted_length_error"] = 0.1
        work.results |= {
            "plan": [plan], "kept": "after", "loss": "kl", "epoch_losses": [1.0], "train_prompts": 1, "tokens": 64,
            "held_out_prompts": 1, "speculative_tokens": 2, "expected_speed_up": {},
            "acceptance": {"after": {"0": {"vllm": counted}}},
        }  # fmt: skip
    file = made / artifacts.MANIFEST_NAME
    valid = json.loads(file.read_bytes())

    def read(rng: Random) -> None:
        found = artifacts.read_manifest(made)
        assert found is not None
        artifacts.is_fresh(made, found.key)
        artifacts.digest(made)
        for each in speculation.read(found.results).values():
            speculation.decide("auto", each, max_num_seqs=8)
            speculation.schedule(each, max_num_seqs=8)
        _print(lambda console: summary.print_artefact(console, made, found))

    return Case(file, lambda rng: _json(rng, valid), read)


def _json(rng: Random, valid: Any) -> bytes:
    return mutations.noise(rng) if rng.randrange(20) == 0 else mutations.as_json(rng, valid)


def _print(show: Callable[[Any], None]) -> None:
    from rich.console import Console

    show(Console(file=io.StringIO(), width=120))


def void(_: object) -> None:
    """What is read is not looked at."""


FORMATS: dict[str, Callable[[Path], Case]] = {
    "model.safetensors": safetensors, "model.safetensors.index.json": index, "config.json": config, "GGUF": gguf_file,
    "tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config, "chat template": chat,
    "recipe": recipe, "JSONL prompts": jsonl, "bundle.json": bundle_json, "result.json": engine_result,
    "quantkit.json": manifest,
}  # fmt: skip
