"""What every room's tests need: small random checkpoints on disk, with a tokenizer and a chat template."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.cli import main

pytest_plugins = ("tests.browser", "tests.hosts")

WriteLlama = Callable[..., Path]
Quantkit = Callable[..., Result]

CORPUS = (
    "The harbour of the town lies open to the west, and when the wind blows from there no ship can leave it. "
    "Say in one sentence what a library is for. Count from one to ten. Name three colours and a thing that has each."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "harbour",
    "town",
    "west",
    "wind",
    "ship",
    "library",
    "sentence",
    "colours",
    "thing",
    "count",
    "open",
    "leave",
    "blows",
    "name",
    "three",
    "ten",
    "one",
]


def write_tokenizer(directory: Path, *, vocab_size: int = 320) -> Tokenizer:
    """Write a byte-level BPE tokenizer with a chat template, and return it; the same text gives the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return tokenizer


def write_tiny_llama(
    directory: Path, *, layers: int = 2, seed: int = 0, vocab_size: int = 320, kv_heads: int = 2, heads: int = 2,
    dtype: torch.dtype = torch.float32, **config: Any,
) -> Path:  # fmt: skip
    """Write a random Llama checkpoint (hidden 64, heads of 64 / heads) with its tokenizer; returns the directory.

    The weights are drawn wide: with the usual initialisation all logits of a random model are nearly equal, and greedy
    decoding turns on the last bit. The output rows of special tokens and of bytes beyond ASCII are zero, so that greedy
    answers are plain text and never end early.
    """
    tokenizer = write_tokenizer(directory, vocab_size=vocab_size)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            **(settings | config),
        )
    )  # fmt: skip
    plain = [i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]).isascii() and tokenizer.decode([i])]
    silent = torch.ones(vocab_size, dtype=torch.bool)
    silent[plain] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    model.to(dtype).save_pretrained(directory)
    return directory


def write_text(path: Path, *, words: int, seed: int) -> Path:
    """Write random English words, other ones for another seed."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(WORDS[pick] for pick in picks) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def quantkit() -> Quantkit:
    """Call the command line in this process: torch, which takes long to import, is there already."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def make_llama() -> WriteLlama:
    """The writer of tiny checkpoints, for tests that need another than `tiny_llama`."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that is only read."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def drifted_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bad quantizer would make of it: linears far from the original's, embeddings as they were."""
    path = tmp_path_factory.mktemp("drifted") / "model"
    shutil.copytree(tiny_llama, path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            weight += weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibration text and a held-out text."""
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder / "calibration.txt", words=3000, seed=1), write_text(
        folder / "held_out.txt", words=3000, seed=2
    )


def quantize_with_kv_scales(
    source: Path, text: Path, out: Path, *, method: str = "gptq", choice: str = "mse", strategy: str = "tensor"
) -> Path:
    """Write a 4-bit checkpoint with scales of an FP8 KV cache; its layers stay beside it. Returns the directory."""
    from quantkit import tokens
    from quantkit.checkpoint import open_checkpoint
    from quantkit.progress import silent
    from quantkit.quantize import stream
    from quantkit.quantize.kv_scales import KvSettings
    from quantkit.quantize.layer import Settings

    checkpoint = open_checkpoint(source)
    windows = tokens.tokenize([str(text)], tokens.load_tokenizer(source), samples=6, length=64, seed=0)
    settings = Settings(
        method, "compressed-tensors", 4, 32, symmetric=False, act_order=True, damping=0.01,
        kv_cache=KvSettings(choice, strategy),  # type: ignore[arg-type]
    )  # fmt: skip
    out.mkdir()
    layers = out.with_suffix(".layers")
    stream.quantize_layers(checkpoint, windows, settings, folder=layers, device="cpu", report=silent)
    stream.write_checkpoint(checkpoint, settings, folder=layers, out=out)
    return out


@pytest.fixture(scope="session")
def make_scaled() -> Callable[..., Path]:
    """The writer of 4-bit checkpoints with KV scales."""
    return quantize_with_kv_scales


def write_bundle(checkpoint: Path, out: Path, settings: Any) -> Path:
    """Write a bundle in which one checkpoint is target and draft. Returns the directory."""
    from quantkit import artifacts
    from quantkit.serve import bundle

    with artifacts.making(out, "bundle", inputs={}, settings=settings.model_dump()) as work:
        bundle.build(work, target=checkpoint, draft=checkpoint, report=None, settings=settings, sources={})
    return out


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """The writer of bundles whose draft is their target."""
    return write_bundle


class RayCluster(NamedTuple):
    """A Ray cluster that a test started: where, and of each node its processes' session, logs, and metrics."""

    address: str
    session_ids: tuple[int, ...]
    logs: tuple[Path, ...]
    metrics_urls: tuple[str, ...]

    def processes(self, word: bytes = b"") -> set[int]:
        """Its living processes that have a word in their command."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError, FileNotFoundError):
                command = (path / "cmdline").read_bytes()  # nothing where it has ended and nobody has asked how
                if command and word in command and os.getsid(int(path.name)) in self.session_ids:
                    found.add(int(path.name))
        return found


@contextmanager
def _ray(*, num_cpus: int, hosts: Sequence[Any] = (), **environment: str) -> Iterator[RayCluster]:
    """A cluster of one machine that listens on 127.0.0.1, or of two hosts (`hosts.py`), with so many CPUs each.

    It wants a token; the environment is this process' too.
    """
    names = (
        "", "runtime-env-agent-", "dashboard-agent-grpc-", "dashboard-agent-listen-", "metrics-export-",
        "ray-client-server-",
    )  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    # not pytest's: the names of the sockets in them must be short
    folders = [tempfile.mkdtemp(prefix="ray-") for _ in hosts or [None]]
    host = hosts[0].address if hosts else "127.0.0.1"
    ray: list[object] = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", num_cpus]
    ray += ["--object-store-memory", "100000000"]
    head = [
        *ray, "--head", "--node-ip-address", host, "--include-dashboard", "false", "--temp-dir", folders[0],
        *(f"--{name}port={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        # Ray's switch for what stays on the loopback address
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1" if hosts else "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # of a machine that is busy with other things
        patch.setenv("RAY_worker_register_timeout_seconds", "1800")
        patch.setenv("RAY_agent_register_timeout_ms", "1800000")
        patch.setenv("RAY_raylet_start_wait_time_s", "240")  # it waits for one that has died, too
        if hosts:  # twice the processes: at Ray's own niceness, 15, other things leave them next to nothing
            patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        for name, value in environment.items():
            patch.setenv(name, value)
        started: list[subprocess.Popen[str]] = []
        try:
            with hosts[0].inside() if hosts else nullcontext():
                started.append(_start_ray(head))
            for other, folder in zip(hosts[1:], folders[1:], strict=True):
                node = [*ray, "--address", f"{host}:{ports['']}", "--node-ip-address", other.address]
                node += ["--temp-dir", folder]
                node += [f"--{name}port={ports[name]}" for name in names[1:-1]]
                with other.inside():
                    started.append(_start_ray(node))
            yield RayCluster(
                address=f"{host}:{ports['']}", session_ids=tuple(node.pid for node in started),
                logs=tuple(Path(folder) / "session_latest" / "logs" for folder in folders),
                metrics_urls=tuple(
                    f"http://{each}:{ports['metrics-export-']}/metrics"
                    for each in (host, *(other.address for other in hosts[1:]))
                ),
            )  # fmt: skip
        finally:
            cluster = RayCluster("", tuple(node.pid for node in started), (), ())
            while left := cluster.processes():  # asked to end by itself it takes a minute
                for process in left:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            for each in started:
                each.wait()
                assert each.stdout is not None
                each.stdout.close()
            for folder in folders:
                shutil.rmtree(folder)


def _start_ray(command: Sequence[object]) -> "subprocess.Popen[str]":
    """A node of a cluster, from when it has joined: on a busy machine one may give up before its agents are there."""
    said = []
    for _ in range(4):
        node = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert node.stdout is not None
        for line in node.stdout:
            said.append(line)
            if "block forever" in line:
                return node
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        node.stdout.close()
    raise AssertionError("".join(said))


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def start_ray() -> Callable[..., AbstractContextManager[RayCluster]]:
    """Starts a Ray cluster for the length of a block."""
    return _ray


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first, those that start vLLM after them, the quickstart last: what fails, fails early.

    Where processes share them out (`-n 2`) it is the other way round, so that none is left with the longest at the end.
    Slow ones run where they are asked for: `-m slow`.
    """
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: ask for it by -m slow"))
    items.sort(
        key=lambda item: 2 * ("quickstart" in item.keywords) + ("vllm" in item.keywords),
        reverse=hasattr(config, "workerinput"),
    )
