"""A GGUF file turned into an FP16 safetensors checkpoint with its tokenizer and chat template."""

import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from quantkit import foreign
from quantkit.architecture import size_problems
from quantkit.errors import QuantkitError, one_line, raise_all, refusing

PREFIX = "gguf:"
_MOST_VALUES = 4 << 20  # in a file's arrays together: a vocabulary of 262,144 has 1 million, with scores and merges
_MOST_TENSORS = 1 << 16
# struct's letter of each type of value, by GGUF's number; 8 is a string, 9 an array
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# The tensors of a layer, with what of its sizes each must have: [out_features, in_features]
_LAYER = {
    "attn_norm": ("hidden",), "attn_q": ("queries", "hidden"), "attn_k": ("keys", "hidden"),
    "attn_v": ("keys", "hidden"), "attn_output": ("hidden", "queries"), "ffn_norm": ("hidden",),
    "ffn_gate": ("inner", "hidden"), "ffn_up": ("inner", "hidden"), "ffn_down": ("hidden", "inner"),
}  # fmt: skip
_AGAIN = "get the file again"


class Header(NamedTuple):
    """What a GGUF file says before its tensors: values by key, without arrays; shapes, outermost first."""

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def is_gguf(source: str) -> bool:
    """Whether a model source names a GGUF file rather than a checkpoint directory."""
    return source.startswith(PREFIX) or source.endswith(".gguf")


def find_gguf(source: str) -> Path:
    """The file behind `gguf:PACKAGE/FILE` (shipped inside an installed Python package) or a plain path.

    Raises:
        QuantkitError: the package is not installed, or there is no such file.
    """
    if not source.startswith(PREFIX):
        path = Path(source)
        if not path.is_file():
            raise QuantkitError(f"{path} is not there: give the path of a .gguf file")
        return path
    package, _, name = source.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise QuantkitError(f"{source}: the package {package!r} is not installed; pip install it first")
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        shipped = ", ".join(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.gguf"))) or "none"
        raise QuantkitError(f"{source}: {package} ships no {name!r}; its GGUF files: {shipped}")
    return path


def convert_gguf(path: Path, out: Path) -> dict[str, str]:
    """Write `path` as an FP16 checkpoint into `out`, through transformers' own GGUF loader.

    Returns what the report says of it: the file and the types its tensors were stored in (a file of 4-bit blocks has
    lost what its blocks lost; FP16 does not bring it back).

    Raises:
        QuantkitError: the file is no GGUF, or of an architecture that transformers cannot convert.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name = path.name
    raise_all(problems(path))
    # In a folder of its own: transformers would go by a tokenizer_config.json that lies beside the file.
    with (
        TemporaryDirectory() as folder,
        refusing(f"{path} cannot be converted", "give a GGUF file of a Llama-family model"),
    ):
        (Path(folder) / name).symlink_to(path.resolve())
        types = sorted({tensor.tensor_type.name for tensor in GGUFReader(path).tensors})
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
        # transformers would go on with random weights in their place
        missing = sorted(found["missing_keys"]) + sorted(str(each) for each in found["mismatched_keys"])
        if missing:
            raise ValueError(f"no tensor for {', '.join(missing[:3])}")
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone; a server runs as another user
    tokenizer.save_pretrained(out)
    return {"gguf": name, "stored_types": ", ".join(types)}


def problems(path: Path) -> list[str]:
    """Why a GGUF file is not opened at all: it is none, is damaged, or speaks of more than it holds; empty as a rule.

    Whoever reads one believes its counts and sizes; so they are looked at here, before anything is made of them.
    """
    try:
        header = read_header(path)
    except ValueError as error:
        return [f"{path} is damaged or no GGUF file ({one_line(error)}): {_AGAIN}"]
    return [f"{path}: {problem}: {_AGAIN}" for problem in _model_problems(header)]


def read_header(path: Path) -> Header:
    """What a GGUF file says before its tensors.

    Raises ValueError for what is no whole GGUF file.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        foreign.regular(path)
    except FileNotFoundError:
        raise QuantkitError(f"{path} is not there: give the path of a .gguf file") from None
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it has less than 24 bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            if data[:4] != b"GGUF":
                raise ValueError(f"it begins with {data[:4]!r}")
            reader.at = 4
            version, num_tensors, num_values = reader.numbers("IQQ")
            if version not in (2, 3):
                raise ValueError(f"version {version}, only 2 and 3 are read")
            if num_tensors > _MOST_TENSORS or num_values > _MOST_TENSORS:
                raise ValueError(f"it claims {num_tensors} tensors and {num_values} values")
            values: dict[str, Any] = {}
            for _ in range(num_values):
                key = reader.string()
                if key in values:
                    raise ValueError(f"{key[:100]!r} twice")
                values[key] = reader.value(reader.numbers("I")[0])
            found: dict[str, tuple[tuple[int, ...], int, int]] = {}
            for _ in range(num_tensors):
                name, (num_dimensions,) = reader.string(), reader.numbers("I")
                if name in found or num_dimensions > 4:
                    raise ValueError(f"tensor {name[:100]!r} twice, or of {num_dimensions} dimensions")
                shape = reader.numbers("Q" * num_dimensions)
                kind, offset = reader.numbers("IQ")
                if kind not in {each.value for each in GGMLQuantizationType}:
                    raise ValueError(f"tensor {name[:100]!r} is of type {kind}")
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                count = math.prod(shape)
                if not shape or count <= 0 or shape[0] % block:
                    raise ValueError(f"tensor {name[:100]!r} has the shape {shape}")
                found[name] = (shape[::-1], offset, count // block * block_bytes)
            alignment = values.get("general.alignment", 32)
            if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
                raise ValueError(f"general.alignment is {str(alignment)[:100]}")
            begin = -(-reader.at // alignment) * alignment
            for name, (_, offset, num_bytes) in found.items():
                if begin + offset + num_bytes > len(data):
                    raise ValueError(f"tensor {name[:100]!r} ends behind the file")
            return Header(values, {name: shape for name, (shape, _, _) in found.items()})


class _Reader:
    """Walks through a GGUF file's beginning; every count is held against what is left of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.left = data, 0, _MOST_VALUES

    def numbers(self, letters: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{letters}")
        return struct.unpack(f"<{letters}", self._take(size))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        return self._take(length).decode("utf-8", errors="strict")

    def value(self, kind: int) -> Any:
        """A value of that type; None for an array, which is walked over."""
        if kind == _STRING:
            return self.string()
        if kind in _LETTERS:
            return self.numbers(_LETTERS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}")
        inner, count = self.numbers("IQ")
        self.left -= count
        if self.left < 0 or (inner != _STRING and inner not in _LETTERS):
            raise ValueError(f"an array of {count} values of type {inner}")
        if inner != _STRING:
            self._take(count * struct.calcsize(_LETTERS[inner]))
            return None
        for _ in range(count):
            self._take(self.numbers("Q")[0])
        return None

    def _take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it is cut off")
        self.at += count
        return self.data[self.at - count : self.at]


def _model_problems(header: Header) -> list[str]:
    """Sizes that the tensors do not have: transformers builds a model of them first, and then looks for its weights."""
    kind = header.values.get("general.architecture")

    def size(key: str, default: object = None) -> object:
        return header.values.get(f"{kind}.{key}", default)

    embedding = header.shapes.get("token_embd.weight", ())
    heads, hidden = size("attention.head_count"), size("embedding_length")
    sizes = {
        "num_hidden_layers": size("block_count"), "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads), "intermediate_size": size("feed_forward_length"),
        "vocab_size": embedding[0] if embedding else None, "head_dim": size("attention.key_length"),
        "max_position_embeddings": size("context_length"),
    }  # fmt: skip
    wrong = size_problems(sizes)
    needed = [key for key in list(sizes)[:6] if sizes[key] is None]
    if wrong or needed:
        return wrong + [f"it does not say {key}" for key in needed]
    return _shape_problems(header.shapes, {key: int(str(value)) for key, value in sizes.items() if value is not None})


def _shape_problems(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> list[str]:
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head_dim = sizes.get("head_dim") or hidden // heads
    lengths = {
        "hidden": hidden, "inner": sizes["intermediate_size"], "queries": heads * head_dim,
        "keys": (sizes["num_key_value_heads"] or heads) * head_dim,
    }  # fmt: skip
    expected = {"token_embd.weight": (sizes["vocab_size"], hidden), "output_norm.weight": (hidden,)}
    expected |= {
        f"blk.{index}.{name}.weight": tuple(lengths[word] for word in words)
        for index in range(sizes["num_hidden_layers"])
        for name, words in _LAYER.items()
    }
    return [
        f"tensor {name} " + (f"is {list(shapes[name])}, not {list(shape)}" if name in shapes else "is missing")
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
