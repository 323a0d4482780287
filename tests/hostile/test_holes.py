"""What files of strangers could do once, by name, and cannot any more."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import artifacts, foreign, headers
from quantkit import gguf as gguf_files
from quantkit.architecture import read_architecture
from quantkit.checkpoint import open_checkpoint
from quantkit.engines import contract
from quantkit.errors import QuantkitError, one_line
from quantkit.tokens import load_tokenizer
from tests.hostile.formats import index

_WITHIN = 6 << 30  # bytes of addresses; what is imported has mapped 4 GiB of them


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", "x" * 5000, "\x1b[31m"]
)
def test_a_weight_map_leads_nowhere_else(tmp_path: Path, shard: str) -> None:
    (tmp_path / headers.INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(QuantkitError, match="is no name of a file in the checkpoint's folder"):
        headers.weight_map(tmp_path)


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "a//b", "", "a\0b", "a/" + "x" * 5000, "\x1b[31m"])
def test_a_manifest_names_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    with artifacts.making(tmp_path / "made", "quantized", inputs={}, settings={}):
        artifacts.write_text(tmp_path / "made/weights", "x")
    path = tmp_path / "made" / artifacts.MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps(manifest | {"files": {name: manifest["files"]["weights"]}}))
    with pytest.raises(QuantkitError, match="is no name of a file in the folder"):
        artifacts.read_manifest(tmp_path / "made")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"key": 1}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(QuantkitError, match="is a link out of"):
        foreign.json_object(folder / "config.json", remedy="get it again", within=folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_text('{"key": 1}')
    (snapshot / "config.json").symlink_to(blobs / "0123")
    assert foreign.json_object(snapshot / "config.json", remedy="get it again", within=snapshot) == {"key": 1}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(QuantkitError, match="a device or a pipe"):
        foreign.json_object(tmp_path / "config.json", remedy="get it again")


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system ['true']", "a: &x [1]\nb: *x", "a: !include /etc/passwd", "[" * 100]
)
def test_yaml_runs_nothing_and_multiplies_nothing(text: str) -> None:
    with pytest.raises(QuantkitError, match="is not YAML that is read here"):
        foreign.yaml_text(text, what="recipe")


@pytest.mark.parametrize("claimed", [1 << 31, 1 << 60, (1 << 64) - 1])
def test_a_header_of_exabytes_takes_no_memory(tmp_path: Path, claimed: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", claimed) + b"{}")
    with pytest.raises(QuantkitError, match="no safetensors file"):
        headers.header(file)


def test_a_gguf_of_2_to_the_40_tensors_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40) + bytes(64))
    program = (
        "import resource, sys; from pathlib import Path; from quantkit import gguf\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({_WITHIN}, {_WITHIN}))\n"
        "print(len(gguf.problems(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and int(done.stdout) > 0, done.stdout + done.stderr
    assert gguf_files.problems(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("hidden_size", 1 << 60), ("vocab_size", -1), ("num_attention_heads", True)],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made_of_them(key: str, value: object) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 280} | sizes | {key: value}
    found, problems = read_architecture(config)
    assert found is None and any(key in problem for problem in problems)


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_beyond_all_vocabularies_takes_no_memory(tiny_llama: Path, tmp_path: Path, place: str) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "model") / "tokenizer.json"
    said = json.loads(path.read_text())
    if place == "vocab":
        said["model"]["vocab"]["harbour"] = 1 << 31
    else:
        said["added_tokens"][0]["id"] = 1 << 31
    path.write_text(json.dumps(said))
    with pytest.raises(QuantkitError, match=f"has a token of id {1 << 31}"):
        load_tokenizer(path.parent)


def test_what_a_stranger_wrote_does_not_steer_the_terminal() -> None:
    assert one_line("a\x1b[31m\nb\u202e").isprintable()


@pytest.mark.parametrize("other", [None, "model-00001-of-00003.safetensors"])
def test_a_tensor_that_the_index_leaves_out_or_puts_elsewhere_is_missing(tmp_path: Path, other: str | None) -> None:
    made = index(tmp_path).file
    said, name = json.loads(made.read_bytes()), "model.layers.0.self_attn.o_proj.weight"
    assert said["weight_map"].pop(name) != other
    said["weight_map"] |= {name: other} if other else {}
    made.write_text(json.dumps(said))
    with pytest.raises(QuantkitError, match=r"o_proj.weight(, and it does not| is missing)"):
        open_checkpoint(made.parent)


def test_the_method_that_an_engine_says_it_ran_is_shown_in_one_line(tmp_path: Path) -> None:
    result = {
        "engine": "x",
        "version": "1",
        "method": "a\x1b[31m\0",
        "import_cpu_s": 1.0,
        "format": "gptq",
        "notes": [],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(QuantkitError, match="ran method") as refused:
        contract.read_result("x", "gptq", tmp_path, contract.Result)
    assert str(refused.value).splitlines()[0].isprintable()
