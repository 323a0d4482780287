"""What do a million tokens cost: from the price of a GPU's hour, which is asked for and never built in."""

from pydantic import BaseModel, ConfigDict


class Cost(BaseModel):
    """Of one deployment at its users: answer tokens a second of all replicas, and dollars for a million."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    answer_tokens_per_s: float
    per_million_answer_tokens: float | None  # None: no price was given
    per_million_tokens: float | None  # prompts counted, too


def sustained(
    *, sequences: int, itl_s: float, prefill_s: float, prompt_tokens: int, answer_tokens: int, replicas: int, gpus: int,
    price_per_hour: float | None,
) -> Cost:  # fmt: skip
    """Of replicas that always decode `sequences` sequences each and, between steps, read the prompts that follow.

    While each of them gets its answer, that takes answer * itl + sequences * prefill seconds. No prompt is found in the
    prefix cache.
    """
    round_s = answer_tokens * itl_s + sequences * prefill_s
    tokens_per_s = replicas * sequences * answer_tokens / round_s
    dollars = None if price_per_hour is None else dollars_per_million(price_per_hour * gpus, tokens_per_s)
    share = answer_tokens / (answer_tokens + prompt_tokens)
    return Cost(
        answer_tokens_per_s=tokens_per_s, per_million_answer_tokens=dollars,
        per_million_tokens=None if dollars is None else dollars * share,
    )  # fmt: skip


def dollars_per_million(price_per_hour: float, tokens_per_s: float) -> float:
    """Dollars for a million tokens."""
    return price_per_hour / 3600 / tokens_per_s * 1e6


def implied_price_per_hour(dollars_per_million: float, tokens_per_s: float) -> float:
    """The price of an hour at which a million tokens cost that much."""
    return dollars_per_million * 3600 * tokens_per_s / 1e6
