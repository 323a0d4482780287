"""Does vLLM itself accept these settings files? Run in a process of its own, from the bundle's folder.

A program, not a module to import: `python -P vllm_flags.py FILE...` prints one JSON line, file -> null or the error.
vLLM's configuration touches process-wide state, and importing it takes half a minute: neither belongs in the caller.
"""

import json
import sys
from typing import Any


def engine_config_error(config_file: str) -> str | None:
    """What vLLM's own parser and engine configuration say against a file, or None when they take it."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-untyped,unused-ignore]
    from vllm.entrypoints.launchers.cli_args import (  # type: ignore[import-untyped,unused-ignore]
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-untyped,unused-ignore]

    parser: Any = make_arg_parser(FlexibleArgumentParser())
    refusals: list[str] = []

    def refuse(message: str) -> None:
        refusals.append(message)
        raise ValueError(message)

    parser.error = refuse  # argparse would end the process, and with it the check of the other file
    try:
        args = parser.parse_args(["--config", config_file])
        validate_parsed_serve_args(args)
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (ValueError, TypeError, KeyError, AssertionError, ImportError, RuntimeError, OSError) as error:
        return refusals[0] if refusals else f"{type(error).__name__}: {_telling(str(error))}"
    return None


def _telling(message: str) -> str:
    """One line of an error: pydantic's says in the first line only how many errors there are."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return next((line for line in lines[1:] if "error" in line.lower() or "[" in line), lines[0])
    return lines[0] if lines else "no reason given"


if __name__ == "__main__":
    print(json.dumps({name: engine_config_error(name) for name in sys.argv[1:]}))
