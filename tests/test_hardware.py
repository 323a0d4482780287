"""The type to compute in is one that the processor multiplies in hardware."""

import platform
import subprocess
import sys

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """In a process of its own: 16 MiB asked for and freed 50 times; faults in pages, then resident bytes."""
    script = """if True:
        import resource, torch
        from quantkit import hardware

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096

        def ask():
            before = faults()
            for _ in range(50):
                torch.ones(4 << 20)
            return faults() - before

        usual = ask()
        hardware.keep_freed_memory()
        ask()
        kept, held = ask(), resident()
        hardware.give_back_freed_memory()
        print(usual, kept, held - resident())
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    usual, kept, given_back = map(int, done.stdout.split())
    assert kept < usual / 10
    assert given_back > 8 << 20
