"""What a draft's plans look like: speed-up against the number of sequences, a line for each number of draft tokens."""

import io
from collections.abc import Sequence

from quantkit.speculation import STANDARD_ERRORS, Plan

_SHOWN = 4  # lines: more than that nobody tells apart


def speedups(plans: Sequence[Plan]) -> str:
    """A panel for each plan, as SVG; the same plans give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "quantkit", "svg.fonttype": "none", "font.size": 9}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            1, len(plans), figsize=(4.5 * len(plans), 3), squeeze=False, sharey=True, layout="constrained"
        )
        for axis, plan in zip(axes[0], plans, strict=True):
            places = range(len(plan.loads))
            numbers = _spread([option.tokens for option in plan.loads[0].options])
            for place, number in enumerate(numbers):
                options = [next(o for o in load.options if o.tokens == number) for load in plan.loads]
                errors = [STANDARD_ERRORS * option.standard_error for option in options]
                axis.errorbar(
                    places, [option.speedup for option in options], yerr=errors, marker="o", markersize=3, capsize=2,
                    linewidth=1.2, color=pyplot.get_cmap("viridis")(0.85 * place / max(len(numbers) - 1, 1)),
                    label=f"{number} token{'s' if number > 1 else ''}",
                )  # fmt: skip
            axis.axhline(1, color="#888888", linewidth=0.8, linestyle="--")
            axis.set(xlabel="sequences at once", ylim=(0, None), title=f"{plan.profile.upper()}, {plan.origin}")
            axis.set_xticks(list(places), [str(load.concurrency) for load in plan.loads])
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set(ylabel="times as fast as without a draft")
        axes[0][-1].legend(frameon=False, fontsize=8, title="drafted")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _spread(numbers: Sequence[int]) -> list[int]:
    """Some of the numbers, the first and the last among them."""
    if len(numbers) <= _SHOWN:
        return list(numbers)
    return [numbers[round(place * (len(numbers) - 1) / (_SHOWN - 1))] for place in range(_SHOWN)]
