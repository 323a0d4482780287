"""Runs smg with these arguments and its API key from a file: it knows keys as arguments only, which show in `ps`."""

import os
import sys
from pathlib import Path

from smg.launch_router import launch_router, parse_router_args


def main() -> None:
    """Clients need the key, and the router shows it to the replicas."""
    file = Path(os.environ["API_KEY_FILE"])
    try:
        key = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        sys.exit(f"the API key cannot be read from {file} ({error.strerror}): see API_KEY_FILE in deploy.env")
    if not key:
        sys.exit(f"{file} is empty: the router would let everybody in")
    arguments = parse_router_args(sys.argv[1:])
    arguments.api_key = key
    launch_router(arguments)


if __name__ == "__main__":
    main()
