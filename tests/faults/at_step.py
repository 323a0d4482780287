"""Runs the command line, and does something to its disk from the moment on when it renames a certain file.

    python -m tests.faults.at_step NAME fill|remove PATH quantkit's words...

fill: the disk is full from then on, whatever is freed; remove: the file is gone.
"""

import sys
from pathlib import Path

from quantkit.cli import main
from tests.faults.mounts import fill

if __name__ == "__main__":
    name, what, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    begun, busy = False, False

    def hook(event: str, given: tuple[object, ...]) -> None:
        global begun, busy
        if busy or event not in ("os.rename", "open"):
            return
        begun = begun or (event == "os.rename" and Path(str(given[1])).name == name)
        if not begun:
            return
        busy = True
        if what == "fill":
            fill(path)
        else:
            path.unlink(missing_ok=True)
        busy = False

    sys.addaudithook(hook)
    main(sys.argv[4:], prog_name="quantkit")
