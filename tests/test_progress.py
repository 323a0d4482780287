"""What is shown while work runs: also the last line of a child's log, whatever is in it."""

import io

import pytest
from rich.console import Console

from quantkit.progress import LINE, Display


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_of_a_log_is_shown_as_it_is(terminal: bool) -> None:
    said = io.StringIO()
    display = Display(Console(file=said, force_terminal=terminal, width=200))
    with display.stage("quantize") as report:
        report("echo, 4 s: [/red] (3/31) [00:00<?, ?it/s]", 0, 0)
        report("echo: [/bold] a note", 0, LINE)
    assert "echo: [/bold] a note" in said.getvalue() and "[/red] (3/31) [00:00<?, ?it/s]" in said.getvalue()
    assert "0/0" not in said.getvalue() or terminal
