"""The type to compute in is one that the processor multiplies in hardware."""

import pytest
import torch

from quantkit import hardware


@pytest.mark.parametrize(
    ("capabilities", "dtype", "lacks_avx512"),
    [
        ({"architecture": "x86_64", "avx2": True}, torch.float32, True),
        ({"architecture": "x86_64", "avx512_f": True}, torch.float32, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, torch.bfloat16, False),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16, False),
        ({"architecture": "aarch64"}, torch.float32, False),
    ],
)
def test_by_capabilities(
    capabilities: dict[str, object], dtype: torch.dtype, lacks_avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_capabilities", lambda: capabilities)
    assert hardware.compute_dtype("cpu") == dtype
    assert hardware.lacks_avx512() == lacks_avx512
    assert hardware.compute_dtype("cuda") == torch.bfloat16
