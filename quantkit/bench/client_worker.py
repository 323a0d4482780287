"""The child of `quantkit.bench.client`: runs `vllm bench serve` with the arguments of each job, in one process."""

import json
from pathlib import Path

from quantkit import processes

JOB_NAME = "arguments.json"


def main() -> None:
    """Run the loads whose folders come on standard input."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def run(folder: Path) -> None:
        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        serve.main(parser.parse_args(json.loads((folder / JOB_NAME).read_text())))

    processes.answer(run)


if __name__ == "__main__":
    main()
