"""The process that renders chat templates: a line of JSON in, a line of JSON out, with little memory and little time.

A template may do without end what Jinja's sandbox allows it, so its process ends with the time or the memory.
"""

import json
import os
import resource
import signal
import sys

MEMORY_BYTES = 2 << 30  # of addresses; half of it is Python with transformers' own renderer
SECONDS = 20  # of one chat
_START_S = 300
_TEXT = 16 << 20  # characters of a rendered chat


def main() -> None:
    """Answer what standard input asks for, until it ends."""
    signal.alarm(_START_S)  # its own action ends the process, whatever runs in it
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.alarm(0)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.alarm(SECONDS)
        try:
            rendered = render_jinja_template(**asked)[0][0]
            answer = {"text": rendered} if len(rendered) <= _TEXT else {"error": f"{len(rendered)} characters"}
        except Exception as error:  # noqa: BLE001  (a template raises what it likes; it is said by who asked)
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.alarm(0)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
