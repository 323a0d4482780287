"""Writes docs/licences.md: the licence of each pinned package, those first that ask something of who passes it on.

    python requirements/licences.py PIP_LICENSES PYTHON PINS

By what the packages in PYTHON's environment say of themselves, as pip-licenses reads it.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "docs" / "licences.md"
_COPYLEFT = re.compile(r"GPL|GNU|MPL|Mozilla|EUPL|CDDL|EPL|SSPL|Proprietary|UNKNOWN", re.IGNORECASE)
_HEAD = """# Licences of the pinned packages

What each package of `{pins}` says of itself, read by pip-licenses (`make licences`). First those whose licence is
copyleft, weak copyleft or proprietary, or that name none: who passes them on, in a container say, must look at them.
quantkit itself carries none of them: its wheel holds quantkit alone.

"""


def main() -> None:
    """Ask pip-licenses and write the table."""
    program, python, pins = sys.argv[1:]
    wanted = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;+]+)", Path(pins).read_text(), re.MULTILINE))
    command = [program, "--python", python, "--format", "json", "--from", "mixed", "--with-system"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rows = {re.sub(r"[-_.]+", "-", each["Name"]).lower(): each for each in said}
    missing = sorted(wanted.keys() - rows.keys())
    if missing:
        sys.exit(f"not installed beside {python}: {', '.join(missing)}")
    lines = []
    for name in wanted:
        licence = " ".join(rows[name]["License"].split())
        lines.append((not _COPYLEFT.search(licence), name, licence if len(licence) <= 100 else f"{licence[:60]} ..."))
    flagged = sum(not free for free, *_ in lines)
    table = ["| package | version | licence |", "|---|---|---|"]
    table += [
        f"| {name} | {wanted[name]} | {licence if free else f'**{licence}**'} |"
        for free, name, licence in sorted(lines)
    ]
    count = f"{len(lines)} packages, {flagged} of them to look at.\n\n"
    OUT.write_text(_HEAD.format(pins=pins) + count + "\n".join(table) + "\n")
    print(f"{OUT.name}: {count.strip()}")


if __name__ == "__main__":
    main()
