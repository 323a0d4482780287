"""The estimate: flat in depth, above what a real run takes, and refused when it cannot be had."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantkit.architecture import read_architecture
from quantkit.errors import QuantkitError
from quantkit.quantize import estimate
from quantkit.quantize.estimate import Need
from quantkit.quantize.layer import Settings, continuations

SCHEME: dict[str, Any] = {
    "format": "compressed-tensors", "bits": 4, "group_size": 128, "symmetric": False, "act_order": True, "damping": 0.01
}  # fmt: skip
SETTINGS = Settings.of(effort="default", **SCHEME)


def llama(layers: int, **changes: Any) -> Any:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": 8192,
        "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    arch, problems = read_architecture(config | changes)
    assert arch is not None, problems
    return arch


def _peak_memory(pid: int) -> int:
    """The most that a process has held so far, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def test_memory_is_flat_in_depth_and_disk_is_not() -> None:
    few, many = (
        estimate.need(llama(layers), SETTINGS, samples=128, length=2048, compute_bytes=2) for layers in (8, 80)
    )
    assert few.memory == many.memory < 64 * 2**30
    assert many.disk > few.disk + 2 * 70 * llama(1).hidden_size ** 2
    more = estimate.need(llama(8), SETTINGS, samples=512, length=2048, compute_bytes=2)
    assert more.memory == few.memory and more.disk > few.disk


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    estimate.check_room(Need(1 << 20, 1 << 20), tmp_path)
    with pytest.raises(QuantkitError, match="of memory") as caught:
        estimate.check_room(Need(1 << 60, shutil.disk_usage(tmp_path).free * 2), tmp_path)
    assert "on the disk" in str(caught.value)


def test_a_real_run_stays_below_it(make_llama, texts: tuple[Path, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = make_llama(tmp_path / "wide", layers=2, hidden_size=512, intermediate_size=1536, heads=8, kv_heads=4)
    arch, _ = read_architecture(json.loads((model / "config.json").read_text()))
    assert arch is not None
    expected = estimate.need(arch, SETTINGS, samples=8, length=128, compute_bytes=4)
    command = [
        sys.executable, "-m", "quantkit.cli", "quantize", model, "--out", tmp_path / "out", "--calibration", texts[0],
        "--samples", "8", "--length", "128",
    ]  # fmt: skip
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peak = 0
    # not ru_maxrss: a child's begins at what its parent held when it was started, here the whole test run's
    while process.poll() is None:
        peak = max(peak, _peak_memory(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    assert 0.6 * expected.memory < peak < 1.2 * expected.memory


# as docs/quantize.md has them, on a processor that computes in float32
@pytest.mark.parametrize(
    ("effort", "layers", "hidden", "inner", "heads", "kv_heads", "tokens", "vocabulary", "measured_mib"),
    [("fast", 1, 2048, 8448, 16, 4, (2, 64), 320, 2507), ("fast", 64, 512, 1536, 8, 4, (8, 512), 49152, 890)],
)
def test_it_is_near_what_was_measured(
    effort: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, tokens: tuple[int, int],
    vocabulary: int, measured_mib: int,
) -> None:  # fmt: skip
    arch = llama(
        layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    settings = Settings.of(
        effort=effort, format="compressed-tensors", bits=4, group_size=128, symmetric=False, act_order=True,
        damping=0.01,
    )  # fmt: skip
    needed = estimate.need(arch, settings, samples=tokens[0], length=tokens[1], compute_bytes=4)
    assert needed.memory >> 20 == pytest.approx(measured_mib, rel=0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16GiB", 16 << 30), ("500 MB", 500_000_000), ("8g", 8 << 30), ("1.5kib", 1536), ("4096", 4096), ("2t", 2 << 40)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert estimate.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "1 GiB 2", "GiB"])
def test_what_is_no_size_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        estimate.parse_bytes(text)


def test_a_budget_is_kept(tmp_path: Path) -> None:
    estimate.check_room(Need(1 << 20, 1 << 20), tmp_path, memory_budget=1 << 20)
    with pytest.raises(QuantkitError, match="--memory-budget gives 1"):
        estimate.check_room(Need(1 << 21, 1 << 20), tmp_path, memory_budget=1 << 20)


def test_time_grows_with_depth_and_tokens_and_with_effort() -> None:
    speed = estimate.Speed(1e12, 5e11)

    def seconds(layers: int, samples: int, settings: Settings = SETTINGS) -> float:
        return estimate.need(
            llama(layers), settings, samples=samples, length=2048, compute_bytes=2, speed=speed
        ).seconds  # fmt: skip

    assert seconds(16, 128) == pytest.approx(2 * seconds(8, 128), rel=0.05)  # the head is there once
    assert seconds(8, 128) < seconds(8, 256) < 2 * seconds(8, 128)
    assert seconds(8, 128) > seconds(8, 128, SETTINGS._replace(output_curvature=False))


@pytest.mark.parametrize(
    ("tokens", "written"),
    [(128 * 2048, 13), (16 * 512, 22), (28672 * 120, 0), (28672 * 120 - 1, 1), (28672 * 1000, 0)],
)
def test_the_model_writes_as_much_as_the_widest_linear_asks_for(tokens: int, written: int) -> None:
    settings = Settings.of(effort="high", **SCHEME)
    assert continuations(settings, llama(80), tokens) == written
    assert continuations(settings._replace(continuations=2), llama(80), tokens) == 2
