"""Prompts and a model's own answers to them, by the real vLLM in batches: to teach drafts, and to calibrate on.

`self:N` prompts come from the target: given only the start of its chat template, an instruct model writes what a user
would ask (Magpie, arXiv 2406.08464).
"""

import enum
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit import chat_template as rendering
from quantkit import foreign, offline, text, tokens
from quantkit.artifacts import write_text
from quantkit.capacity.duration import WRITTEN
from quantkit.errors import QuantkitError
from quantkit.offline import Session
from quantkit.progress import LINE, Report
from quantkit.tokens import TokenSet

CHATS = 0.6  # windows of new chats for one that goes on from text: they are more alike (docs/quantize.md)
_CHAT_TOKENS = 160  # of a chat of one turn, rather too few: SmolLM2-135M's have 190, larger models' answers are longer
_MARK = "\u241e"  # stands for the user's words while the template is cut apart; no prompt holds it


class Purpose(enum.IntEnum):
    """What a model writes prompts for. Each has its own by the same seed: what judges was in no calibration."""

    CALIBRATION = 0
    DRAFT = 1
    EVALUATION = 2
    MORE_CALIBRATION = 3  # windows of chats besides those that were asked for


class Exchange(NamedTuple):
    """A prompt, rendered by the chat template, and the target's answer, both as token ids."""

    prompt: list[int]
    answer: list[int]


class Template(NamedTuple):
    """A chat template cut at the user's words."""

    before: list[int]  # what stands before them
    end_of_turn: int | None  # the token that ends them


def chat_template(tokenizer: Any) -> Template:
    """Cut the tokenizer's chat template at the user's words; without a template only the BOS stands before them."""
    if not getattr(tokenizer, "chat_template", None):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return Template(bos, tokenizer.eos_token_id)
    rendered = rendering.render(tokenizer, [{"role": "user", "content": _MARK}])
    before, mark, after = rendered.partition(_MARK)
    if not mark:
        raise QuantkitError("the chat template drops the user's words: give prompts from a file instead of self:N")
    end = tokenizer(after, add_special_tokens=False)["input_ids"]
    return Template(tokenizer(before, add_special_tokens=False)["input_ids"], end[0] if end else None)


def render(tokenizer: Any, document: text.Document) -> list[int]:
    """A prompt (or a chat, up to its last user turn) as the token ids that a chat server would make of it."""
    if not getattr(tokenizer, "chat_template", None):
        ids: list[int] = tokenizer(tokens.as_text(document, tokenizer))["input_ids"]
        return ids
    chat = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    while chat and chat[-1]["role"] != "user":
        chat.pop()
    chat_text = rendering.render(tokenizer, chat, add_generation_prompt=True)
    rendered: list[int] = tokenizer(chat_text, add_special_tokens=False)["input_ids"]
    return rendered


def prompts(
    session: Session, source: str, target: Path, *, purpose: Purpose, longest: int, seed: int, folder: Path,
    report: Report, held_out: int,
) -> list[list[int]]:  # fmt: skip
    """Distinct rendered prompts of at most `longest` tokens, from a text source or written by the target.

    Raises:
        QuantkitError: fewer than `held_out` + 1 prompts were left after filtering, or `self:N` of a target without a
            chat template.
    """
    tokenizer = tokens.load_tokenizer(target)
    wanted = text.self_prompts(source)
    if wanted is not None and not getattr(tokenizer, "chat_template", None):
        raise QuantkitError(
            f"prompts {source}: {target} has no chat template, and asks itself nothing without one: give prompts from "
            "a file, or the instruct model's tokenizer_config.json"
        )
    if wanted is None:
        found: list[text.Document] = list(text.documents(source))
    else:
        found = list(
            _self_written(
                session, target, tokenizer, wanted, purpose=purpose, longest=longest, seed=seed, folder=folder,
                report=report,
            )
        )  # fmt: skip
    distinct = {json.dumps(document, sort_keys=True).casefold(): document for document in found}
    rendered = [list(ids) for ids in dict.fromkeys(tuple(render(tokenizer, each)) for each in distinct.values())]
    room = longest + len(render(tokenizer, " "))  # the template's own tokens do not count
    kept = [prompt for prompt in rendered if len(prompt) <= room]
    twice, cut = len(found) - len(rendered), len(rendered) - len(kept)
    if twice or cut:
        report(
            f"of {len(found)} prompts {twice} came twice and {cut} had more than {longest} tokens: they are left out",
            0, LINE,
        )  # fmt: skip
    kept = kept[: wanted or None]
    if len(kept) <= held_out:
        raise QuantkitError(
            f"prompts {source!r}: {len(kept)} distinct ones of at most {longest} tokens are left, and {held_out} are "
            "held out: give more or shorter prompts, or hold out fewer"
        )
    return kept


def _self_written(
    session: Session, target: Path, tokenizer: Any, count: int, *, purpose: Purpose, longest: int, seed: int,
    folder: Path, report: Report,
) -> list[str]:  # fmt: skip
    template = chat_template(tokenizer)
    stop = {token for token in (template.end_of_turn, tokenizer.eos_token_id) if token is not None}
    requests = [
        offline.Request(
            name=f"prompt-{number}", prompt=template.before, temperature=1.0, max_tokens=longest,
            seed=(purpose << 30) + seed * 1_000_003 + number,  # of which a CPU generator takes 32 bits
            stop_token_ids=sorted(stop),
        )
        for number in range(round(count * WRITTEN))
    ]  # fmt: skip
    job = offline.Job(model=str(target), requests=requests, max_model_len=len(template.before) + longest + 1, seed=seed)
    results, _ = session.run(
        job, folder / "prompts", on_result=lambda done, total: report("the target writes prompts", done, total)
    )
    finished = [result.tokens for result in results if result.finished == "stop"]
    asked = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in finished)
    return [question for question in asked if len(question) >= 12 and "\ufffd" not in question]


def answers(
    session: Session,
    target: Path,
    prompt_ids: Sequence[list[int]],
    *,
    longest: int,
    seed: int,
    folder: Path,
    report: Report,
    temperatures: Sequence[float] = (0.0,),
    what: str = "the target answers",
) -> list[Exchange]:
    """The target's answers in the order of the prompts, at each temperature in turn; empty ones are left out."""
    stop = stop_tokens(target)
    requests = [
        offline.Request(
            name=f"answer-{number}", prompt=list(prompt), max_tokens=longest, stop_token_ids=stop,
            temperature=temperature, seed=seed * 1_000_003 + number if temperature else None,
        )
        for number, (prompt, temperature) in enumerate(zip(prompt_ids, itertools.cycle(temperatures), strict=False))
    ]  # fmt: skip
    job = offline.Job(
        model=str(target), requests=requests, max_model_len=max(map(len, prompt_ids)) + longest + 1, seed=seed
    )
    results, _ = session.run(job, folder / "answers", on_result=lambda done, total: report(what, done, total))
    pairs = zip(prompt_ids, results, strict=True)
    return [Exchange(list(prompt), result.tokens) for prompt, result in pairs if len(result.tokens) > 1]


def chats(
    session: Session, checkpoint: Path, count: int, *, prompt_tokens: int, answer_tokens: int, temperature: float,
    seed: int, folder: Path, report: Report, purpose: Purpose = Purpose.CALIBRATION,
) -> list[text.Document]:  # fmt: skip
    """Up to `count` chats of one turn that the model holds with itself, its answers sampled at `temperature`.

    None where it finished no prompt, as a model that is not tuned for chats may.
    """
    tokenizer = tokens.load_tokenizer(checkpoint)
    written = _self_written(
        session, checkpoint, tokenizer, count, purpose=purpose, longest=prompt_tokens, seed=seed, folder=folder,
        report=report,
    )  # fmt: skip
    asked = list(dict.fromkeys(written))[:count]
    if not asked:
        return []
    rendered = [render(tokenizer, question) for question in asked]
    exchanges = answers(
        session, checkpoint, rendered, longest=answer_tokens, seed=seed, folder=folder, report=report,
        temperatures=(temperature,),
    )  # fmt: skip
    said = {
        tuple(exchange.prompt): tokenizer.decode(exchange.answer, skip_special_tokens=True) for exchange in exchanges
    }
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": said[tuple(prompt)]}]
        for question, prompt in zip(asked, rendered, strict=True)
        if tuple(prompt) in said
    ]


def continuations(
    session: Session, checkpoint: Path, windows: TokenSet, copies: int, *, seed: int, folder: Path, report: Report
) -> TokenSet:
    """Windows that begin as the given ones do somewhere, and go on as the model does, sampled at temperature 1.

    Of each window `copies` pieces are taken, a quarter of its length and from anywhere in it, and continued to its
    length. What ends sooner is joined to the next, behind EOS, so that at most copies * samples windows come of it.
    """
    length = windows.input_ids_ST.shape[1]
    begin = int(windows.adds_bos)
    body = length - begin
    shown = max(body // 4, 1)
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        row[place : place + shown]
        for row in windows.input_ids_ST[:, begin:].tolist() * copies
        for place in [int(torch.randint(body - shown + 1, (), generator=generator))]
    ]
    bos = windows.input_ids_ST[0, :begin].tolist()
    requests = [
        offline.Request(
            name=f"continuation-{number}", prompt=bos + piece, temperature=1.0, max_tokens=body - shown,
            seed=seed * 1_000_003 + number,
        )
        for number, piece in enumerate(pieces)
    ]  # fmt: skip
    job = offline.Job(model=str(checkpoint), requests=requests, max_model_len=length + 1, seed=seed)
    results, _ = session.run(
        job, folder / "continuations", on_result=lambda done, total: report("the model reads on", done, total)
    )
    texts = [piece + result.tokens for piece, result in zip(pieces, results, strict=True)]
    found = [text for text in texts if len(text) == body]
    ended = [token for text in texts if len(text) < body for token in text]  # each has its EOS
    found += [ended[place : place + body] for place in range(0, len(ended) - body + 1, body)]
    return TokenSet(torch.tensor([bos + text for text in found], dtype=torch.int64), windows.adds_bos)


def own_chats(
    session: Session, checkpoint: Path, most: int, *, length: int, seed: int, folder: Path, report: Report
) -> TokenSet:
    """At most `most` windows of chats that the model holds with itself, other ones than those of `self:N`."""
    held = chats(
        session, checkpoint, -(-most * length // _CHAT_TOKENS), prompt_tokens=128, answer_tokens=256, temperature=1.0,
        seed=seed, folder=folder, report=report, purpose=Purpose.MORE_CALIBRATION,
    )  # fmt: skip
    return tokens.in_order(held, tokens.load_tokenizer(checkpoint), most=most, length=length)


def extended(
    session: Session, checkpoint: Path, windows: TokenSet, copies: int, *, seed: int, folder: Path, report: Report
) -> TokenSet:
    """The windows, and behind them, mixed, what the model writes: to text as to chats.

    For each window of text `copies` that go on from pieces of it, and for each of chats CHATS times as many of new
    ones. A model that finishes none, as one may that was not tuned for chats, goes on from those that it was given.
    """
    if not copies:
        return windows
    ids_ST, length = windows.input_ids_ST, windows.input_ids_ST.shape[1]
    sets = []
    if windows.of_chats:
        most = math.ceil(CHATS * copies * len(windows.of_chats))
        sets.append(
            own_chats(session, checkpoint, most, length=length, seed=seed, folder=folder / "chats", report=report)
        )
    replaced = windows.of_chats if sets and len(sets[0].input_ids_ST) else ()
    begun = [sample for sample in range(len(ids_ST)) if sample not in replaced]
    if begun:
        pieces = TokenSet(ids_ST[begun], windows.adds_bos)
        sets.append(continuations(session, checkpoint, pieces, copies, seed=seed, folder=folder, report=report))
    more_ST = torch.cat([each.input_ids_ST for each in sets])
    order = torch.randperm(len(more_ST), generator=torch.Generator().manual_seed(seed))
    return windows._replace(input_ids_ST=torch.cat([ids_ST, more_ST[order]]), written=len(more_ST))


def stop_tokens(checkpoint: Path) -> list[int]:
    """The tokens at which a server of this checkpoint stops: the tokenizer's EOS and generation_config's."""
    stop = {tokens.load_tokenizer(checkpoint).eos_token_id}
    path = checkpoint / "generation_config.json"
    if path.is_file():
        eos = foreign.json_object(path, remedy="get the file again", within=checkpoint).get("eos_token_id")
        stop |= {token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int}
    return sorted(token for token in stop if isinstance(token, int))


def split(prompt_ids: Sequence[list[int]], sizes: Sequence[int], *, seed: int) -> list[list[list[int]]]:
    """Distinct prompts drawn apart by seed: so many in each part, and last the rest."""
    order = torch.randperm(len(prompt_ids), generator=torch.Generator().manual_seed(seed)).tolist()
    begins = [0, *itertools.accumulate(sizes), len(order)]
    return [[prompt_ids[i] for i in order[begin:end]] for begin, end in itertools.pairwise(begins)]


def save_exchanges(path: Path, exchanges: Sequence[Exchange]) -> None:
    """Write exchanges as JSON lines of token ids."""
    write_text(path, "".join(json.dumps(exchange._asdict()) + "\n" for exchange in exchanges))


def load_exchanges(path: Path) -> list[Exchange]:
    """Read what `save_exchanges` wrote."""
    return [Exchange(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
