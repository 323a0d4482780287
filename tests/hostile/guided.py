"""The same readers under libFuzzer, which keeps the inputs that reach code no input reached before.

    pip install atheris==2.3.0
    python -m tests.hostile.guided --format recipe --runs 100000 --corpus FOLDER

quantkit's own modules are instrumented, not those of torch or transformers. FOLDER keeps the inputs found; a hole ends
the run, with the input in a file that libFuzzer names. One format a run: libFuzzer ends its process itself.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

SEEDS = 64  # of what the other fuzzer makes, to begin with


def main() -> None:
    """Fuzz one format."""
    with atheris.instrument_imports(include=["quantkit"]):
        from tests.hostile.formats import FORMATS
    import torch

    from tests.hostile.fuzz import Hole, Watch, attempt

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="guided-", dir=options.corpus.parent))
    tempfile.tempdir = str(folder)
    case = FORMATS[options.format](folder)
    for number in range(SEEDS):
        (options.corpus / f"seed-{number}").write_bytes(case.mutate(Random(f"guided {number}")))
    watch, count = Watch(folder), 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        signal.alarm(300)
        try:
            attempt(case, Random(count), watch, data)
        except Hole as hole:
            raise SystemError(f"{options.format}: {hole}") from hole  # what libFuzzer takes for a crash
        finally:
            watch.seen = ""

    words = [f"-runs={options.runs}", f"-seed={options.seed}", "-max_len=65536", "-timeout=60", "-rss_limit_mb=6144"]
    atheris.Setup([sys.argv[0], *words, f"-artifact_prefix={options.corpus.parent}/hole-", str(options.corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
