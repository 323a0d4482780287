"""From how many requests at once more of them add no tokens a second: guidellm's search, where guidellm is here.

It is a tool of its own with packages of its own, so it is asked as a program and not imported.
"""

import json
from pathlib import Path
from typing import Any

from quantkit import processes
from quantkit.errors import QuantkitError
from quantkit.serve.verdict import find_tool
from quantkit.speculation import Profile

_TOOL = "guidellm"
_FEWEST = 5  # points that it wants to see a knee in
# A second of its client takes a processor that serves as well.
_POINT_S: dict[Profile, int] = {"cpu": 20, "gpu": 60}


def find() -> str:
    """The program.

    Raises:
        QuantkitError: it is not here.
    """
    tool = find_tool(_TOOL)
    if tool is None:
        raise QuantkitError(
            "--knee: guidellm is not here: install it in an environment of its own and put it on PATH, "
            "for example pipx install guidellm==0.8.1"
        )
    return tool


def streams(most: int) -> list[int]:
    """Requests at once to try: doubling up to as many as the server takes at once, five numbers at least."""
    doubled = [2**power for power in range(12) if 2**power <= most]
    return doubled if len(doubled) >= _FEWEST else list(range(1, max(most, _FEWEST) + 1))


def search(
    base_url: str, model: str, tokenizer: Path, prompts: Path, *, most: int, profile: Profile, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """The knee of a running server, with guidellm's reason and every point that it tried; its files go to `folder`.

    Raises:
        QuantkitError: guidellm is not here, or failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "guidellm.json"
    profile_of = {"kind": "knee", "initial_streams": streams(most)}
    command: list[str | Path] = [
        find(), "run", "--backend", f"kind=openai_http,target={base_url},model={model}",
        "--profile", json.dumps(profile_of), "--constraint", f"kind=max_duration,seconds={_POINT_S[profile]}",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer.resolve()}",
        "--data", f"kind=json_file,path={prompts.resolve()}", "--output", f"kind=json,path={found.resolve()}",
        "--output", f"kind=html,path={(folder / 'guidellm.html').resolve()}", "--disable-console-interactive",
    ]  # fmt: skip
    env = processes.passed_on(("PATH", "HOME", "LANG", "TMPDIR")) | {"HF_HUB_OFFLINE": "1"}
    log = folder / "guidellm.log"
    spent = processes.run_logged(command, env=env, folder=folder, log=log)
    if spent.exit_code or not found.is_file():
        raise QuantkitError(f"guidellm failed ({processes.telling_line(log)}); the whole log is {log}")
    return read(json.loads(found.read_bytes()))


def read(told: dict[str, Any]) -> dict[str, Any]:
    """What guidellm's JSON says of the knee."""
    final = next(each["final"]["throughput"] for each in told["conclusions"] if each["kind"] == "knee_detection")
    points = [
        {
            "concurrency": one["metrics"]["request_concurrency"]["successful"]["mean"],
            "tokens_per_s": one["metrics"]["output_tokens_per_second"]["successful"]["mean"],
        }
        for one in told["benchmarks"]
    ]
    return {"status": final["status"], "reason": final["reason"], "knee": final["knee"], "points": points}
