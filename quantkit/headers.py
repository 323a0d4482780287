"""Which tensors are in which file of a checkpoint, of which type and shape? By what index and headers say."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from quantkit import foreign
from quantkit.errors import QuantkitError, one_line

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_HEADER_BYTES = 32 << 20  # the largest that is read; one of 300 tensors takes 30 KB
_AGAIN = "download it again"

Header = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> safetensors' word for its type, its shape


class _Index(BaseModel):
    model_config = ConfigDict(strict=True)
    weight_map: dict[str, str]


def weight_map(checkpoint: Path) -> dict[str, Path]:
    """Tensor -> file, as the index of a sharded checkpoint says; that the files are there is not looked at.

    Raises:
        FileNotFoundError: there is no index.
        QuantkitError: no readable weight_map, or a file that is not directly in the checkpoint's folder.
    """
    index = checkpoint / INDEX_NAME
    read = foreign.json_model(index, _Index, remedy="no readable weight_map: get the file again", within=checkpoint)
    for file in sorted(set(read.weight_map.values())):
        if not foreign.is_name(file):
            raise QuantkitError(
                f"{index}: {one_line(repr(file))[:200]} is no name of a file in the checkpoint's folder: "
                "get the file again"
            )
    return {name: checkpoint / file for name, file in read.weight_map.items()}


def header(path: Path, *, within: Path | None = None) -> Header:
    """Each tensor of a safetensors file, from its header alone.

    Raises:
        FileNotFoundError: there is nothing of that name.
        QuantkitError: a truncated file, or none of safetensors.
    """
    foreign.regular(path, within=within)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_BYTES:
            raise QuantkitError(f"{path} is no safetensors file (a header of {length} bytes): {_AGAIN}")
        with safe_open(path, framework="numpy") as tensors:
            views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (no mapping)
            return {str(name): (str(view.get_dtype()), tuple(view.get_shape())) for name, view in views.items()}
    except (SafetensorError, OSError, UnicodeError) as error:
        raise QuantkitError(f"{path} is truncated or no safetensors file ({one_line(error)}): {_AGAIN}") from None
