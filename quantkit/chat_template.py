"""What does a checkpoint's chat template make of a chat? Rendered in a process that may use a little time and memory.

transformers renders in Jinja's sandbox, which keeps a template from code and files, and not from going on for ever or
from filling the memory.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from quantkit import processes
from quantkit.chat_template_worker import MEMORY_BYTES, SECONDS
from quantkit.errors import QuantkitError, one_line

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
_REMEDY = "get the checkpoint's chat template again, or give plain text"


def render(tokenizer: Any, chat: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
    """The chat as text: what `tokenizer.apply_chat_template(chat, tokenize=False)` gives.

    Raises:
        QuantkitError: the template refuses the chat, or takes more time or memory than any template does.
    """
    asked = {
        "conversations": [list(map(dict, chat))],
        "chat_template": tokenizer.get_chat_template(),
        "add_generation_prompt": add_generation_prompt,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    answer = _renderer().ask(asked)
    if "text" in answer:
        return str(answer["text"])
    raise QuantkitError(f"the chat template cannot render a chat ({one_line(answer['error'])}): {_REMEDY}")


@functools.cache
def _renderer() -> "_Renderer":
    return _Renderer()


class _Renderer:
    """The process, started with the first chat and again after a template that ended it; it ends with this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        child = self.process if self.process is not None and self.process.poll() is None else self._start()
        assert child.stdin is not None and child.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asked) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        if answer.endswith("\n"):
            found: dict[str, Any] = json.loads(answer)
            return found
        child.kill()
        child.wait()
        self.process = None
        return {"error": f"it took more than {SECONDS} s or {MEMORY_BYTES >> 30} GiB"}

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "quantkit.chat_template_worker"]
        env = processes.passed_on(_PASSED_ON) | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )  # fmt: skip
        return self.process
