"""What a finished run says on the terminal: a screenful of what was found, and where to look."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import artifacts, speculation
from quantkit.artifacts import Manifest
from quantkit.errors import QuantkitError, one_line, refusing
from quantkit.progress import spoken

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.capacity.claims import Judged
    from quantkit.capacity.planning import Plan
    from quantkit.engines.registry import Engine, Grids
    from quantkit.formats import Storage, Storages
    from quantkit.serve.verdict import Check

Row = tuple[str, str]


def evaluation_rows(results: dict[str, Any]) -> list[Row]:
    """The evaluation in lines of a name and a value, candidate by candidate."""
    rows, several = [], len(results["candidates"]) > 1
    for candidate in results["candidates"]:
        cache = "" if candidate["kv_cache"] == "auto" else f", {candidate['kv_cache']} KV cache"
        who = f"{candidate['name']}{cache}: " if several or cache else ""
        for kind, found in candidate["on"].items():
            perplexity, drift, kl = found["perplexity"], found["drift"], found["kl_nats"]
            rows += [
                (f"{who}perplexity on {kind}", f"{perplexity['reference']:.3f} -> {perplexity['candidate']:.3f}"),
                (f"{who}drift on {kind}", f"{drift['value']:+.2%}{_between(drift, '.2%')}"),
                (f"{who}KL on {kind}, nats", f"{kl['value']:.4f}{_between(kl, '.4f')}"),
                (f"{who}top-1 agreement on {kind}", f"{found['top1_agreement']['value']:.2%}"),
            ]
        if kept := candidate.get("cache"):
            rows.append((f"{who}KV cache", f"{kept['type']}, scales: {kept['scales']}"))
            for kind, found in kept["on"].items():
                kl = found["kl_nats"]
                rows.append((f"{who}the cache adds on {kind}, nats", f"{kl['value']:.4f}{_between(kl, '.4f')}"))
            if left := kept["leave_at_16_bits"]:
                rows.append((f"{who}layers to leave at 16 bits", ", ".join(map(str, left))))
        if why := candidate.get("not_served"):
            rows.append((f"{who}not asked of vLLM", why))
        for kind, found in (candidate["served"] or {}).items():
            apart = found["gap_nats"]
            rows.append((f"{who}vLLM apart on {kind}, nats", f"{apart['value']:+.4f}{_between(apart, '.4f')}"))
        for task in candidate["tasks"]:
            told = f"{task['reference']:.4g} -> {task['candidate']:.4g}, {task['recovery']:.1%} recovered"
            rows.append((f"{who}{task['task']}, {task['metric']}", f"{told} +- {task['standard_error']:.1%}"))
        if candidate["acceptance"]:
            rows.append((f"{who}tokens a step with the draft", _length(candidate["acceptance"])))
    for kind, found in results["sets"].items():
        rows.append((f"scored on {kind}", f"{found['scored_tokens']} tokens in {found['sequences']} sequences"))
    verdict = results["verdict"]
    said = [gate["sentence"] for gate in results["gates"] if gate["verdict"] == verdict != "passed"]
    return [*rows, (f"by the profile {results['profile']}", "; ".join([verdict, *said]))]


def _between(found: dict[str, Any], spelling: str) -> str:
    if not found["interval"]:
        return ""
    low, high = (format(each, spelling) for each in found["interval"])
    return f" ({low} to {high})"


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
    if results.get("kind") == "eagle3":
        engine, layers = results["engine"], ", ".join(map(str, results["reads_behind_layers"]))
        told = f"on the states behind {layers} layers, trained by {engine['name']} {engine['version']}"
        rows += [("an EAGLE-3 head", told), ("before training", results["before"])]
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


def bundle_rows(record: dict[str, Any], bundle: Path) -> list[Row]:
    """What a bundle serves, whether it may, what it costs in KV cache, and who vouches for it."""
    from quantkit.serve.signing import SIGNATURE

    settings, pin, cache = record["settings"], record["pin"], record["kv_cache"]
    report, digests = record["measured"].get("report", {}), record["digests"]
    per_token, per_sequence = sum(cache["bytes_per_token"].values()), cache["bytes_per_sequence"]
    rows = [
        ("serves", f"{settings['served_model_name']}, {record['engine']}, {settings['tensor_parallel_size']} GPU(s)"),
        ("verdict", _judged(record, report)),
        ("target", f"{_written(record, 'target')}, digest {digests['target'][:16]}"),
        ("made from", f"checkpoint {pin['base'][:16]}" if pin.get("base") else "not recorded"),
    ]
    if pin["draft"]:
        fits = {None: "not recorded for which target", pin["target"]: "trained for this target"}
        trained = fits.get(pin["draft_trained_for"], "trained for ANOTHER target")
        rows.append(("draft", f"{_written(record, 'draft')}, digest {pin['draft'][:16]}, {trained}"))
    why = record["speculation"]["decisions"]
    rows += [(f"speculation on {speculation.PLACES[name]}", each["why"]) for name, each in why.items()]
    if not pin["draft"] and not why:
        rows.append(("draft", "none"))
    rows += [
        (
            "KV cache",
            f"{cache['dtype']}, {per_token} bytes a token and rank, {per_sequence / 2**30:.3f} GiB for one sequence of "
            f"{settings['max_model_len']} tokens, {settings['max_num_seqs']} at once at most",
        ),
        ("signature", "there is one: quantkit serve verify" if (bundle / SIGNATURE).is_file() else "none"),
    ]
    return rows + [("warning", line) for line in record["warnings"]]


def _judged(record: dict[str, Any], report: dict[str, Any]) -> str:
    if "verdict" not in report:
        return "not judged: the bundle carries no evaluation"
    if record["digests"]["target"] not in record["inputs"]["report"].values():
        return "not judged: the evaluation in it is of another checkpoint"
    drifts = [
        f"drift on {kind} {found['drift']['value']:+.2%}"
        for candidate in report["candidates"]
        if candidate["digest"] == f"sha256:{record['digests']['target']}" and candidate["kv_cache"] == "auto"
        for kind, found in candidate["on"].items()
    ]
    return "; ".join([f"{report['verdict']} by the profile {report['profile']}", *drifts])


def _written(record: dict[str, Any], role: str) -> str:
    """How a checkpoint of a bundle is stored, and how large it is."""
    config = record["quantization_config" if role == "target" else "draft_quantization_config"]
    size = sum(found["size"] for name, found in record.get("files", {}).items() if name.startswith(f"{role}/"))
    return (config["quant_method"] if config else "not quantized") + (f", {size / 1e6:.0f} MB" if size else "")


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


def bench_rows(results: dict[str, Any]) -> list[Row]:
    """What each technique gave, where speculation turns negative, what is served within the limits, at what price."""
    lines = results["summary"] + [f"{name} was left out: {why}" for name, why in results["left_out"].items()]
    return [(str(number), line) for number, line in enumerate(lines, 1)]


def print_rows(console: "Console", title: str, rows: list[Row]) -> None:
    """A table of names and values."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(*(Text(one_line(each)) for each in (name, value)))  # no markup: a stranger may have written it
    console.print(table)


def print_run(console: "Console", out: Path, manifests: dict[str, Manifest]) -> None:
    """The run's table and where the bundle and the report are."""
    parts = (
        ("target", "Quantized target", quantized_rows), ("report", "Against FP16", evaluation_rows),
        ("draft", "Draft", draft_rows), ("bundle", "Bundle", speculation_rows), ("served", "Served", served_rows),
        ("bench", "Before and after", bench_rows),
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
        console.print("[green]passed[/]" if one.passed else "[red]FAILED[/]", end=" ", highlight=False)
        console.print(one.name, style="bold", end=": ", highlight=False, markup=False)
        console.print(one_line(one.detail), highlight=False, markup=False)


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

    console = Console()
    manifest = artifacts.read_manifest(path) if path.is_dir() else None
    print_artefact(console, path, manifest)
    if manifest is not None and manifest.results.get("kind") == "eagle3":
        return  # a head is no checkpoint of its own
    if (path / "config.json").is_file():
        _print_checkpoint(console, path)
    elif manifest is None:
        raise QuantkitError(f"{path} is neither a checkpoint nor an artefact of quantkit: it has no config.json")


def print_artefact(console: "Console", path: Path, manifest: Manifest | None) -> None:
    """What a stage made, by its manifest and what else lies there.

    Raises:
        QuantkitError: they do not say what those of a stage say.
    """
    with refusing(f"{path} holds results that quantkit did not write", "make it again"):
        _print_artefact(console, path, manifest)


def _print_artefact(console: "Console", path: Path, manifest: Manifest | None) -> None:
    by_kind = {"quantized": quantized_rows, "report": evaluation_rows, "draft": draft_rows, "served": served_rows,
               "bench": bench_rows}  # fmt: skip
    if manifest is not None:
        rows = [
            ("kind", manifest.kind),
            ("finished", manifest.finished),
            ("took", _cost(manifest)),
            ("quantkit", manifest.versions.get("quantkit", "?")),
        ]
        if manifest.kind != "bundle":  # a bundle's own rows name them
            rows += [(f"input {name}", digest[:16]) for name, digest in manifest.inputs.items()]
        print_rows(console, str(path), rows)
        if manifest.kind == "bundle":
            from quantkit.serve.bundle import read_bundle

            print_rows(console, "Bundle", bundle_rows(read_bundle(path), path))
        if manifest.kind in by_kind:
            print_rows(console, "Results", by_kind[manifest.kind](manifest.results))


def _print_checkpoint(console: "Console", path: Path) -> None:
    from quantkit.checkpoint import open_checkpoint

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


def print_plan(plan: "Plan", judged: "Sequence[Judged]") -> None:
    """A plan as tables, and what must be known besides."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from quantkit.capacity import tables

    console = Console()
    console.print(tables.head(plan), style="bold", highlight=False)
    for each in tables.tables(plan, judged):
        shown = Table(title=each.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
        for place, header in enumerate(each.headers):
            shown.add_column(header, overflow="fold", style=None if place else "cyan")
        for row in each.rows:
            shown.add_row(*row)
        console.print()
        console.print(shown, highlight=False, markup=False)
    console.print()
    for remark in tables.remarks(plan):
        console.print(f"- {remark}", highlight=False, markup=False)
    for name, text in plan.formulas.items():
        console.print(f"  {name} = {text}", style="dim", highlight=False, markup=False)


def _stored(storages: "Storages | None") -> str:
    """How linears are stored, and how many of them otherwise."""
    if storages is None:
        return "not quantized"

    def named(storage: "Storage | None") -> str:
        return f"{storage.bits} bit, group {storage.group_size}" if storage else "16 bit"

    others = Counter(named(storage) for storage in storages.special.values())
    usual = f"{named(storages.usual)}, {storages.usual.format}"
    return "; ".join([usual, *(f"{count} linears {name}" for name, count in sorted(others.items()))])
