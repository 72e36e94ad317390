"""Reads pip-audit's JSON: `audit_report.py FILE`. Its own exit code is 0 where the database did not know a package.

Exit codes: 0 all packages are known and have no advisory, 1 there are advisories, 2 some packages were not audited.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: str) -> int:
    packages = json.loads(Path(path).read_text(encoding="utf-8"))["dependencies"]
    found = [(package, advisory) for package in packages for advisory in package.get("vulns", ())]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {advisory['id']}, mended in {fixed}")
    if skipped:
        print(
            f"audit: {len(skipped)} of {len(packages)} packages were not audited, because the advisory database did "
            f"not answer for them: {', '.join(skipped[:5])}{', ...' if len(skipped) > 5 else ''}"
        )
        return 1 if found else 2
    print(f"audit: {len(packages)} packages, {len(found)} advisories")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
