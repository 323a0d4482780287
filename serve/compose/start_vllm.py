"""Becomes `vllm serve` with these arguments, its API key taken from a file: as an argument it would show in `ps`."""

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Refuse a vLLM below VLLM_FLOOR and a key that is not there, then start it."""
    found, floor = version("vllm"), os.environ.pop("VLLM_FLOOR")
    if _release(found) < _release(floor):
        sys.exit(f"vLLM {found} is below {floor}, in which known holes were closed: take a newer image")
    file = Path(os.environ["API_KEY_FILE"])
    try:
        key = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        sys.exit(f"the API key cannot be read from {file} ({error.strerror}): see API_KEY_FILE in deploy.env")
    if not key:
        sys.exit(f"{file} is empty: vLLM would answer everybody")
    os.environ["VLLM_API_KEY"] = key
    # What stands behind the command `vllm`, which is not on every PATH. -P: the bundle has a folder named vllm.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", *sys.argv[1:]])


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


if __name__ == "__main__":
    main()
