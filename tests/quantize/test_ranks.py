"""Two processes under torchrun: the same checkpoint as one makes, within the rounding of a sum in another order."""

import os
import subprocess
import sys
from pathlib import Path

from quantkit.checkpoint import open_checkpoint


def quantize(out: Path, model: Path, text: Path, *launcher: str) -> "subprocess.CompletedProcess[str]":
    quantkit = str(Path(sys.executable).with_name("quantkit"))
    command = [
        *launcher, quantkit, "quantize", model, "--out", out, "--calibration", text, "--samples", "5", "--length", "64",
        "--group-size", "32",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=900)


TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
    "--nproc-per-node", "2", "--no-python",
)  # fmt: skip


def test_two_ranks_make_what_one_makes(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        done = quantize(tmp_path / name, tiny_llama, texts[0], *launcher)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (open_checkpoint(tmp_path / name, quantized=True) for name in ("one", "two"))
    # Scales of inputs follow what reaches them, and with it an integer that was tipped in a layer before.
    apart = 1e-2
    for index in range(one.arch.num_layers):
        for name, tensor in one.layer(index).items():
            # A sum in another order may tip a weight to the next integer: few of them, and none further.
            difference = (tensor - two.layer(index)[name]).abs()
            assert (difference > apart * tensor.abs()).float().mean() < 0.02, (index, name)
            assert difference.max() <= 0.2 * tensor.abs().max()
    outer = two.outer()
    for name, tensor in one.outer().items():
        assert (tensor - outer[name]).abs().max() <= apart * tensor.abs().max(), name


def test_a_second_rank_with_nothing_to_do_is_sent_home(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Found fresh, or wrong from the start."""
    for said, code in (("needs about", 0), ("fresh", 0)):
        done = quantize(tmp_path / "out", tiny_llama, texts[0], *TORCHRUN)
        assert done.returncode == code and said in done.stderr, done.stderr[-2000:]
    wrong = quantize(tmp_path / "wrong", tiny_llama / "nowhere", texts[0], *TORCHRUN)
    assert wrong.returncode != 0 and "nowhere" in wrong.stderr
