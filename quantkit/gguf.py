"""A GGUF file turned into an FP16 safetensors checkpoint with its tokenizer and chat template."""

import importlib.util
from pathlib import Path

from quantkit.errors import QuantkitError

PREFIX = "gguf:"


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

    try:
        types = sorted({tensor.tensor_type.name for tensor in GGUFReader(path).tensors})
        folder, name = str(path.parent), path.name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, OSError, NotImplementedError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuantkitError(f"{path} cannot be converted ({line}): give a GGUF file of a Llama-family model") from error
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone; a server runs as another user
    tokenizer.save_pretrained(out)
    return {"gguf": name, "stored_types": ", ".join(types)}
