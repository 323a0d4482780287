"""How is a file that a stranger may have written read? As data, up to a size, from its own folder, or not at all."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from quantkit.errors import QuantkitError, one_line, raise_all

JSON_BYTES = 16 << 20  # in memory twenty times that at worst; the index of a model of 400B takes 0.1 MB
YAML_BYTES = 1 << 20  # which takes seconds to read
_DEPTH = 64  # of what stands inside one another; whoever walks the values calls itself as often
_NAME_BYTES = 255  # on every file system of Linux
_HUB_BLOBS = "blobs"  # where the Hub's cache holds what the links of its snapshots lead to

ModelT = TypeVar("ModelT", bound=BaseModel)


def is_name(text: str) -> bool:
    """Whether it can be the name of a file, and of one in the folder that it is looked for in."""
    if not text.isprintable() or len(text.encode()) > _NAME_BYTES:
        return False
    return text not in ("", ".", "..") and "/" not in text


def regular(path: Path, *, within: Path | None = None) -> None:
    """Refuse what is no plain file, and a link out of the folder `within`; nothing is read.

    The Hub's cache is laid out in links: those of a snapshot may lead to the blobs of the same repository.

    Raises:
        FileNotFoundError: there is nothing of that name.
        QuantkitError: a folder, a device, a pipe, or a link that leads out.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise QuantkitError(f"{path} is a link to nothing: get the file again") from None
        raise
    except (OSError, ValueError) as error:  # names that are too long, links in a circle, NUL
        raise QuantkitError(f"{one_line(path)} cannot be read ({one_line(error)}): get the file again") from None
    if stat.S_ISDIR(found.st_mode):
        raise QuantkitError(f"{path} is a folder: a file was expected")
    if not stat.S_ISREG(found.st_mode):
        raise QuantkitError(f"{path} is a device or a pipe: a file was expected")
    if within is None:
        return
    folder, led = within.resolve(), path.resolve()
    hub = folder.parent.parent if folder.parent.name == "snapshots" else None
    if not led.is_relative_to(folder) and not (hub and led.parent == hub / _HUB_BLOBS):
        raise QuantkitError(f"{path} is a link out of {within}: copy the folder with cp -rL and give the copy")


def read(path: Path, *, most: int, within: Path | None = None) -> bytes:
    """The bytes of a plain file of at most so many.

    Raises:
        FileNotFoundError: there is nothing of that name.
        QuantkitError: as `regular`, or it is larger.
    """
    regular(path, within=within)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(most + 1)
    except PermissionError:
        raise QuantkitError(f"{path} may not be read: give yourself the right to (chmod u+r)") from None
    if len(data) > most:
        raise QuantkitError(f"{path} has more than the {most >> 20} MiB that are read of such a file: get it again")
    return data


def json_value(path: Path, *, remedy: str, within: Path | None = None) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is nothing of that name.
        QuantkitError: as `read`, or it is not JSON, or nested more than 64 deep.
    """
    data = read(path, most=JSON_BYTES, within=within)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # not UTF-8, and numbers of thousands of digits, are ValueErrors too
        raise QuantkitError(f"{path} is not JSON ({one_line(error)[:200]}): {remedy}") from None
    _refuse_depth(path, value, remedy)
    return value


def json_object(path: Path, *, remedy: str, within: Path | None = None) -> dict[str, Any]:
    """What a JSON file holds, which must be an object; raises as `json_value`."""
    value = json_value(path, remedy=remedy, within=within)
    if not isinstance(value, dict):
        raise QuantkitError(f"{path} is not a JSON object: {remedy}")
    return value


def json_model(path: Path, model: type[ModelT], *, remedy: str, within: Path | None = None) -> ModelT:
    """What a JSON file holds, as a pydantic model; raises as `json_value`, naming each key that is wrong."""
    return validated(model, json_value(path, remedy=remedy, within=within), where=str(path), remedy=remedy)


def validated(model: type[ModelT], value: object, *, where: str, remedy: str) -> ModelT:
    """A value as a pydantic model.

    Raises:
        QuantkitError: each key that is wrong, and the remedy.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = [
            f"{where}: {one_line('.'.join(map(str, each['loc'])) or 'it')[:200]}: {one_line(each['msg'])[:200]}"
            for each in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise_all([f"{line}: {remedy}" for line in found])
        raise AssertionError("a validation error without details") from error


def yaml_value(path: Path, *, what: str) -> Any:
    """What a YAML file of one document holds; `what` the file is, is for the errors' words.

    Raises:
        FileNotFoundError: there is nothing of that name.
        QuantkitError: as `read`, or it is not YAML; tags and aliases are refused, and what is nested more than 64 deep.
    """
    return yaml_text(read(path, most=YAML_BYTES), what=f"{what} {path}")


def yaml_text(text: bytes | str, *, what: str) -> Any:
    """What a YAML document holds; raises as `yaml_value`."""
    try:
        return yaml.load(text, Loader=_Loader)
    # Unicode, days that no month has and numbers of thousands of digits are ValueErrors
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise QuantkitError(f"{what} is not YAML that is read here: {one_line(error)[:400]}") from None


class _Loader(yaml.SafeLoader):
    """YAML without what a stranger can do with it: tags name types, aliases make megabytes of a line."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node, unless it is one of those."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = f"line {event.start_mark.line + 1}"
        if type(event) is yaml.AliasEvent:
            raise yaml.YAMLError(f"{line}: write it out instead of the alias *{str(event.anchor)[:100]}")
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.YAMLError(f"{line}: leave out the tag {str(event.tag)[:100]!r}")
        if self.depth >= _DEPTH:
            raise yaml.YAMLError(f"{line}: more than {_DEPTH} deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _refuse_depth(path: Path, value: object, remedy: str) -> None:
    level = [value]
    for _ in range(_DEPTH):
        inner: list[object] = []
        for each in level:
            inner += each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return
    raise QuantkitError(f"{path} is nested more than {_DEPTH} deep: {remedy}")
