"""What the commands share: how an error becomes a line and an exit code, and options that several of them take."""

import errno
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from quantkit.cli import option_values
from quantkit.errors import QuantkitError

Command = TypeVar("Command", bound=Callable[..., Any])

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again; it goes on where it stopped",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another --out",
    errno.EACCES: "permission denied: choose an --out that you may write",
    errno.ENOENT: "is not there any more: put it back and run the same command again; it goes on where it stopped",
}


def friendly(command: Command) -> Command:
    """Turn a QuantkitError, a full disk or Ctrl-C into a line on stderr and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except QuantkitError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno  # safetensors gives none
            if number not in _DISK_ERRORS:
                raise
            where = error.filename2 or error.filename or (error if error.errno is None else None)
            click.secho(f"error: {f'{where}: ' if where else ''}{_DISK_ERRORS[number]}", fg="red", err=True)
            sys.exit(QuantkitError.exit_code)
        except KeyboardInterrupt:
            click.secho("stopped; the same command goes on where it was", fg="yellow", err=True)
            sys.exit(130)

    return run  # type: ignore[return-value]


def display() -> Any:
    """Progress on stderr."""
    from rich.console import Console

    from quantkit.progress import Display

    return Display(Console(stderr=True))


def was_given(name: str) -> bool:
    """Whether an option of the running command is there because the user wrote it."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


out = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
fresh = click.option("--fresh", is_flag=True, help="Replace what --out holds instead of resuming or refusing.")
on = click.option(
    "--on", "cluster", metavar="ADDRESS", callback=option_values.cluster,
    help="Ray cluster on which vLLM writes and answers: ray://HOST:PORT, or auto (RAY_ADDRESS, or the one here).",
)  # fmt: skip
device = click.option("--device", default="cpu", show_default=True, help="torch device, for example cuda.")
