"""Runs a command whose whole process group ends with whoever started it, however that one ends: SIGKILL leaves no word.

keeper.py FD COMMAND...: FD is the reading end of a pipe whose other end the starter holds. When that closes, the group
is killed. The command takes this process' place; what watches is a grandchild, which the command never sees.
"""

import os
import signal
import sys


def main() -> None:
    """Leave a watcher behind and become the command."""
    told = int(sys.argv[1])
    if os.fork() == 0:
        if os.fork() == 0:
            _watch(told)
        os._exit(0)
    os.wait()
    os.close(told)
    os.execvp(sys.argv[2], sys.argv[2:])


def _watch(told: int) -> None:
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asked, signal.SIG_IGN)  # meant for the command, which may want to end in order
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # whoever reads what the command prints must see its end
        os.dup2(nothing, number)
    while os.read(told, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
