"""What a finished run says on the terminal: a screenful of what was found, and where to look."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import artifacts, speculation
from quantkit.artifacts import Manifest
from quantkit.progress import spoken

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.engines.registry import Engine, Grids
    from quantkit.formats import Storage, Storages
    from quantkit.serve.check import Check

Row = tuple[str, str]


def evaluation_rows(results: dict[str, Any]) -> list[Row]:
    """The evaluation in lines of a name and a value."""
    perplexity, drift, kl = results["perplexity"], results["drift"], results["kl_nats"]
    return [
        ("perplexity, FP16 -> quantized", f"{perplexity['reference']:.3f} -> {perplexity['candidate']:.3f}"),
        ("perplexity drift", f"{drift['value']:+.2%} +- {drift['standard_error']:.2%} (standard error)"),
        ("KL(FP16 || quantized)", f"{kl['mean']:.4f} +- {kl['standard_error']:.4f} nats a token"),
        ("same most likely token", f"{results['top1_agreement']['value']:.2%}"),
        ("scored", f"{results['scored_tokens']} tokens in {results['sequences']} sequences"),
    ]


def draft_rows(results: dict[str, Any]) -> list[Row]:
    """The draft's acceptance before and after training, on vLLM and by its logits."""
    accepted = results["acceptance"]

    def steps(tell: Callable[[dict[str, Any]], str]) -> str:
        return " -> ".join(tell(each) for name, each in accepted.items())

    rows = [
        (
            "accepted on vLLM, " + " -> ".join(accepted),
            steps(lambda each: f"{each['0']['vllm']['acceptance_rate']:.1%}"),
        ),
        ("tokens a step on vLLM", steps(lambda each: _length(each["0"]["vllm"]))),
    ]
    for heat in (heat for heat, each in accepted["after"].items() if "offline" in each):
        kinds = ["greedy"] if heat == "0" else ["greedy", "sampled"]
        rows += [
            (
                f"tokens a step by logits, temperature {heat}" + (f", {kind} proposals" if len(kinds) > 1 else ""),
                steps(lambda each, heat=heat, kind=kind: _length(each[heat]["offline"][kind])),  # type: ignore[misc]
            )
            for kind in kinds
        ]
    first = accepted[results["kept"]]["0"]["vllm"]["per_position"]
    rows += [
        ("accepted at each position, as kept", ", ".join(f"{share:.0%}" for share in first)),
        (f"{results['loss']} by epoch", " -> ".join(f"{loss:.2f}" for loss in results["epoch_losses"])),
    ]
    if "before" in results:
        rows.append(("before training", results["before"]))
    if "epoch_accepted_lengths" in results:
        lengths = " -> ".join(f"{length:.2f}" for length in results["epoch_accepted_lengths"])
        rows.append(("tokens a step on validation prompts", lengths))
    return [
        *rows,
        ("trained on", f"{results['train_prompts']} prompts, {results['tokens']} tokens an epoch"),
        ("held out", f"{results['held_out_prompts']} prompts, {results['speculative_tokens']} draft tokens, greedy"),
        ("kept", _kept(results)),
        *_plan_rows(results),
    ]  # fmt: skip


def _kept(results: dict[str, Any]) -> str:
    """Which weights and, where there were two to choose from, what was expected of either."""
    words = {"after": "16-bit", "quantized": "4-bit"}
    expected = [f"{words[name]} {each['gpu']:.2f}" for name, each in results["expected_speed_up"].items()]
    told = f" ({', '.join(expected)} times as fast, one sequence at once on GPUs)" if len(expected) > 1 else ""
    return f"{words[results['kept']]} weights{told}"


def _plan_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (f"expected on {speculation.PLACES[profile]}", f"{speculation.in_words(plan)} ({plan.basis})")
        for profile, plan in speculation.read(results).items()
    ]


def speculation_rows(results: dict[str, Any]) -> list[Row]:
    """Whether a bundle speculates on each kind of machine, and why."""
    return [(f"speculation on {speculation.PLACES[name]}", why) for name, why in results["speculation"].items()]


def _length(counted: dict[str, Any]) -> str:
    error = counted["accepted_length_error"]
    return f"{counted['accepted_length']:.2f}" + (f" +- {error:.2f}" if error else "")


def quantized_rows(results: dict[str, Any]) -> list[Row]:
    """Engine, sizes and, of the native engine, the worst linear of a quantized checkpoint."""
    linears = sorted(results["linears"], key=lambda note: float(note["relative_error"]))
    before, after = results["source_weights_bytes"], results["weights_bytes"]
    rows = [("weights, FP16 -> quantized", f"{before / 1e6:.0f} MB -> {after / 1e6:.0f} MB")]
    if "engine" in results:  # not in the manifests of early versions
        engine = results["engine"]
        took = f"{spoken(engine['wall_s'])}, peak {engine['peak_memory_bytes'] / 1e9:.1f} GB"
        rows.insert(0, ("engine", f"{engine['name']} {engine['version']}, {engine['method']}, {took}"))
    if not linears:
        return rows
    worst, dead = linears[-1], sum(note["dead_inputs"] for note in linears)
    rows += [
        ("relative output error, median", f"{linears[len(linears) // 2]['relative_error']:.4f}"),
        ("relative output error, worst", f"{worst['relative_error']:.4f} ({worst['linear']})"),
    ]
    return rows + ([("dead inputs", str(dead))] if dead else [])


def served_rows(results: dict[str, Any]) -> list[Row]:
    """What the running server was seen to do."""
    rows = [(check["name"], check["detail"]) for check in results["checks"]]
    return [*rows, ("server ready after", spoken(results["ready_s"]))]


def print_rows(console: "Console", title: str, rows: list[Row]) -> None:
    """A table of names and values."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def print_run(console: "Console", out: Path, manifests: dict[str, Manifest]) -> None:
    """The run's table and where the bundle and the report are."""
    parts = (
        ("target", "Quantized target", quantized_rows), ("report", "Against FP16", evaluation_rows),
        ("draft", "Draft", draft_rows), ("bundle", "Bundle", speculation_rows), ("served", "Served", served_rows),
    )  # fmt: skip
    for folder, title, rows in parts:
        if folder in manifests:
            console.print()
            print_rows(console, title, rows(manifests[folder].results))
    cost = [(folder, _cost(manifest)) for folder, manifest in manifests.items()]
    console.print()
    print_rows(console, "Time and memory", cost)
    console.print()
    console.print(f"bundle  {out / 'bundle'}", highlight=False, soft_wrap=True)
    console.print(f"report  {out / 'report' / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"serve   quantkit serve up {out / 'bundle'}", highlight=False, soft_wrap=True)


def _cost(manifest: Manifest) -> str:
    cost = manifest.cost
    return f"{spoken(float(cost['wall_s']))}, peak {float(cost['peak_memory_bytes']) / 1e9:.1f} GB"


def print_evaluation(console: "Console", out: Path) -> None:
    """The evaluation in `out`, if there is one."""
    manifest = artifacts.read_manifest(out)
    if manifest is not None and manifest.kind == "report":
        print_rows(console, "Against FP16", evaluation_rows(manifest.results))
        console.print(f"report  {out / 'report.html'}", highlight=False, soft_wrap=True)


def print_draft(console: "Console", manifest: Manifest) -> None:
    """The draft's acceptance."""
    print_rows(console, "Draft", draft_rows(manifest.results))


def print_checks(console: "Console", checks: "Sequence[Check]") -> None:
    """Checks, one a line, what failed in red."""
    for one in checks:
        mark = "[green]passed[/]" if one.passed else "[red]FAILED[/]"
        console.print(f"{mark} [bold]{one.name}[/]: {one.detail}", highlight=False)


def print_engines(console: "Console") -> None:
    """Every engine: its version, whether its environment is there, what it writes, and whether its upstream lives."""
    from quantkit import __version__
    from quantkit.engines import environment, registry

    print_rows(console, f"native {__version__}", [
        ("state", "part of quantkit"), ("methods", "gptq, awq, awq+gptq: compressed-tensors, gptq, awq"),
        ("upstream", "alive: this project"),
    ])  # fmt: skip
    for name, engine in registry.EVERY.items():
        state, folder = environment.state(name), environment.folder(name)
        if state is not None:
            made = f"installed, {state.disk_bytes / 1e9:.1f} GB, in {folder}"
        elif folder.exists():
            made = f"being made, or half made: quantkit engines install {name}"
        else:
            made = f"not installed ({engine.disk_gb:.1f} GB, {engine.minutes:.0f} min): at its first use"
        print_rows(console, f"{name} {engine.version}", [
            ("state", made), ("methods", _methods(engine)), ("upstream", engine.upstream), ("instead", engine.instead),
        ])  # fmt: skip


def _methods(engine: "Engine") -> str:
    """Which methods there are and how each is stored, those alike together."""
    by_storage: dict[str, list[str]] = {}
    for method, grids in engine.methods.items():
        by_storage.setdefault(_grids(grids), []).append(method)
    return "; ".join(f"{', '.join(methods)}: {stored}" for stored, methods in by_storage.items())


def _grids(grids: "Grids") -> str:
    if grids.symmetric == grids.asymmetric:
        return grids.symmetric or "a draft"
    sides = (("symmetric", grids.symmetric), ("asymmetric", grids.asymmetric))
    return ", ".join(f"{format} ({side})" for side, format in sides if format)


def print_path(path: Path) -> None:
    """What a checkpoint or an artefact is."""
    from rich.console import Console

    from quantkit.checkpoint import open_checkpoint
    from quantkit.errors import QuantkitError

    console = Console()
    manifest = artifacts.read_manifest(path) if path.is_dir() else None
    by_kind = {"quantized": quantized_rows, "report": evaluation_rows, "draft": draft_rows, "served": served_rows}
    if manifest is not None:
        rows = [
            ("kind", manifest.kind),
            ("finished", manifest.finished),
            ("took", _cost(manifest)),
            ("quantkit", manifest.versions.get("quantkit", "?")),
            *((f"input {name}", digest[:16]) for name, digest in manifest.inputs.items()),
        ]
        print_rows(console, str(path), rows)
        if manifest.kind in by_kind:
            print_rows(console, "Results", by_kind[manifest.kind](manifest.results))
    if (path / "config.json").is_file():
        opened = open_checkpoint(path)
        arch, stored = opened.arch, _stored(opened.storages)
        size = sum(file.stat().st_size for file in set(opened.shards.values()))
        heads = f"{arch.num_heads} heads, {arch.num_kv_heads} key/value heads of {arch.head_dim}"
        print_rows(console, "Checkpoint", [
            ("architecture", arch.family.architecture),
            ("layers", f"{arch.num_layers} of hidden size {arch.hidden_size}, {heads}"),
            ("vocabulary", f"{arch.vocab_size}" + (", tied head" if arch.tied_embeddings else "")),
            ("weights", f"{size / 1e6:.0f} MB in {len(set(opened.shards.values()))} files, {stored}"),
        ])  # fmt: skip
    elif manifest is None:
        raise QuantkitError(f"{path} is neither a checkpoint nor an artefact of quantkit: it has no config.json")


def _stored(storages: "Storages | None") -> str:
    """How linears are stored, and how many of them otherwise."""
    if storages is None:
        return "not quantized"

    def named(storage: "Storage | None") -> str:
        return f"{storage.bits} bit, group {storage.group_size}" if storage else "16 bit"

    others = Counter(named(storage) for storage in storages.special.values())
    usual = f"{named(storages.usual)}, {storages.usual.format}"
    return "; ".join([usual, *(f"{count} linears {name}" for name, count in sorted(others.items()))])
