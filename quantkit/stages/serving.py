"""A bundle on the real vLLM, here: whether it does what was promised, and what each technique gives."""

from pathlib import Path

from quantkit.artifacts import Manifest, Work
from quantkit.errors import QuantkitError
from quantkit.progress import Report
from quantkit.recipe import Bench
from quantkit.stages.stage import Stage


def serve_once(bundle_dir: Path) -> Stage:
    """The bundle served by the real vLLM on this machine and asked what was promised."""

    def make(work: Work, report: Report) -> None:
        from quantkit.serve import prove

        work.results |= prove.prove(bundle_dir, out=work.out, report=report)

    def verdict(manifest: Manifest) -> None:
        failed = [check for check in manifest.results["checks"] if not check["passed"]]
        if failed:
            lines = "; ".join(f"{check['name']}: {check['detail']}" for check in failed)
            raise QuantkitError(f"{bundle_dir} did not serve what it promises: {lines}")

    return Stage("serve", "served", {"bundle": bundle_dir}, {}, make, verdict)


def bench(bundle_dir: Path, baseline: Path, *, settings: Bench) -> Stage:
    """The bundle and the checkpoint that it was made from on the real vLLM, one technique at a time."""

    def make(work: Work, report: Report) -> None:
        from quantkit.bench import run

        work.results |= run.bench(bundle_dir, baseline, settings=settings, out=work.out, folder=work.partial,
                                  report=report)  # fmt: skip

    return Stage("bench", "bench", {"bundle": bundle_dir, "baseline": baseline}, {"bench": settings.model_dump()}, make)
