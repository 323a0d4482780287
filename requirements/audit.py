"""Are there known vulnerabilities in the pins? Asks pip-audit, where its data can be reached, and says where not.

    python requirements/audit.py PIP_AUDIT FILE ...

Exit code 1 where a pin has a known vulnerability; what could not be asked is said, and is no failure.
"""

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Audit each file of pins."""
    program, *files = sys.argv[1:]
    vulnerable = 0
    for name in files:
        command = [program, "--requirement", name, "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        run = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
        try:
            asked = json.loads(run.stdout)["dependencies"]
        except (json.JSONDecodeError, KeyError):
            last = (run.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            print(f"{name}: not audited, the data could not be reached ({last[:200]})")
            continue
        unknown = [each["name"] for each in asked if "skip_reason" in each]
        found = [(each, one) for each in asked for one in each.get("vulns", [])]
        vulnerable += len(found)
        print(f"{name}: {len(asked) - len(unknown)} pins audited, {len(unknown)} not known to the registry here")
        for each, one in found:
            fixed = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"  {each['name']} {each['version']}: {one['id']}, mended in {fixed}")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    assert all(Path(name).is_file() for name in sys.argv[2:]), sys.argv
    sys.exit(main())
