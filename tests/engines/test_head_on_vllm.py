"""`train-draft --kind eagle3` from prompts to the bundle on the real vLLM, with a worker that copies a head."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from quantkit import artifacts
from quantkit.checkpoint import Checkpoint
from quantkit.cli import main
from quantkit.engines import environment, registry

pytestmark = pytest.mark.vllm

COPY = """
import json, shutil, sys, pathlib
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_bytes())
exchanges = [json.loads(line) for line in open(job["exchanges"])]
shutil.copytree({made!r}, job["out"])
result = {{"engine": "speculators", "version": {version!r}, "method": job["method"], "import_cpu_s": 0.0,
          "notes": ["%d exchanges" % len(exchanges)], "steps": 3, "epoch_losses": [2.0, 1.5],
          "first_token_agreement": 0.1}}
(folder / "result.json").write_text(json.dumps(result))
"""


def _call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def test_from_prompts_to_the_bundle(
    config: dict[str, Any], tensors: dict[str, Tensor], eight_layers: Checkpoint, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made, worker, prompts = tmp_path / "made", tmp_path / "worker.py", tmp_path / "prompts.jsonl"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config | {"speculators_config": {}}))
    save_file(tensors, made / "model.safetensors")
    worker.write_text(COPY.format(made=str(made), version=registry.EVERY["speculators"].version))
    prompts.write_text("".join(json.dumps({"prompt": f"Count from {n} to ten."}) + "\n" for n in range(9)))
    monkeypatch.setattr(environment, "ensure", lambda name, report: None)
    monkeypatch.setattr(environment, "python", lambda name: Path(sys.executable))
    monkeypatch.setattr(registry, "worker", lambda name: worker)
    out = tmp_path / "my-eagle3" / "head"  # a word that vLLM guesses from, rightly here
    code, said = _call(
        "train-draft", eight_layers.path, "--out", out, "--kind", "eagle3", "--prompts", prompts,
        "--held-out-prompts", 3, "--validation-prompts", 1, "--answer-tokens", 12, "--speculative-tokens", 3,
    )  # fmt: skip
    assert code == 0 and "5 exchanges" in said, said
    manifest = artifacts.read_manifest(out)
    assert manifest is not None
    found = manifest.results
    assert (found["kind"], found["train_prompts"], found["epoch_losses"]) == ("eagle3", 5, [2.0, 1.5])
    assert found["loss"] == "forward_kl" and found["engine"]["name"] == "speculators" and "untrained" in found["before"]
    (counted,) = found["acceptance"].values()
    assert set(counted["0"]) == {"vllm"} and counted["0"]["vllm"]["drafts"] > 0
    assert counted["0"]["vllm"]["proposed"] == 3 * counted["0"]["vllm"]["drafts"]
    assert {plan["profile"]: plan["origin"] for plan in found["plan"]}["gpu"] in ("measured", "estimated")
    assert CliRunner().invoke(main, ["inspect", str(out)]).exit_code == 0

    bundle = tmp_path / "bundle"
    pair = ("--target", eight_layers.path, "--draft", out)
    code, said = _call("serve", "bundle", *pair, "--out", bundle, "--speculate", "always")
    assert code == 0, said
    assert yaml.safe_load((bundle / "vllm/serve.yaml").read_text())["speculative-config"]["method"] == "eagle3"
    assert CliRunner().invoke(main, ["serve", "check", str(bundle)]).exit_code == 0
