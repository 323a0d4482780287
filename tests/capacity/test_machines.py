"""GPUs by name, by file and by number."""

from pathlib import Path

import pytest

from quantkit.capacity import machines
from quantkit.errors import QuantkitError

NAMES = {
    "h100-80gb", "h100-nvl", "h200", "b200", "a100-40gb", "a100-80gb", "l4", "l40s", "a10g", "rtx-4090", "rtx-5090",
    "rtx-6000-ada", "mi300x",
}  # fmt: skip


def test_each_gpu_has_its_source() -> None:
    assert machines.table().keys() >= NAMES
    for name, gpu in machines.table().items():
        assert gpu.source is not None and gpu.source.url.startswith("https://"), name
        assert gpu.fp8_tflops is None or gpu.fp8_tflops == pytest.approx(2 * gpu.bf16_tflops, rel=0.02), name
    without = {name for name, gpu in machines.table().items() if gpu.fp8_tflops is None}
    assert without == {"a100-40gb", "a100-80gb", "a10g"}, "Ampere has no FP8"


def test_an_h100_as_its_data_sheet_has_it() -> None:
    roof = machines.find("H100-80GB").roof()
    assert (roof.bytes_per_s, roof.operations_per_s) == (3.35e12, 989e12)
    assert machines.find("h100-80gb").roof(fp8=True).operations_per_s == 1979e12
    assert machines.find("a100-80gb").roof(fp8=True).operations_per_s == 312e12, "no FP8 products: 16-bit ones"


def test_names_files_and_numbers(tmp_path: Path) -> None:
    assert machines.asked("h100-80gb:4") == ("h100-80gb", 4)
    assert machines.asked("my.yaml") == ("my.yaml", 1)
    with pytest.raises(QuantkitError, match="'four' is no number of GPUs"):
        machines.asked("h100:four")
    with pytest.raises(QuantkitError, match=r"--gpu h100 is not known; did you mean .*h100-80gb"):
        machines.find("h100")
    with pytest.raises(QuantkitError, match=r"GPU .*none\.yaml is not there"):
        machines.find(str(tmp_path / "none.yaml"))
    own = tmp_path / "own.yaml"
    machines.save(machines.find("l4").model_copy(update={"title": "mine"}), own)
    assert machines.find(str(own)).title == "mine"
    own.write_text("title: mine\nmemory_mib: 1\nbandwidth_gb_s: -1\nbf16_tflop: 3\n")
    with pytest.raises(QuantkitError, match=r"(?s)bandwidth_gb_s.*bf16_tflop is no setting; did you mean bf16_tflops"):
        machines.find(str(own))
