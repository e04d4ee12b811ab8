"""Take the pictures of a report that docs/ shows: python scripts/screenshot_report.py report.html docs

Needs Chromium (Debian: apt-get install chromium). 1400 pixels wide as at a desk, 390 as on a phone, both of the top of
the page and of the plots, the desk's once more in the dark.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chromium import BROWSER, Chromium  # tests drive the same browser

_SHOTS = (
    ("report-1400.png", 1400, 1500, False, "summary"),
    ("report-1400-dark.png", 1400, 1500, True, "pareto"),
    ("report-390.png", 390, 1500, False, "summary"),
)


def main() -> None:
    if BROWSER is None:
        sys.exit("no Chromium here; on Debian: apt-get install chromium")
    page, folder = map(Path, sys.argv[1:])
    with Chromium() as browser:
        for name, width, height, dark, section in _SHOTS:
            browser.open(page, width, height=height, dark=dark)
            if section != "summary":
                browser.evaluate(
                    f"document.getElementById({section!r}).scrollIntoView({{behavior: 'instant'}});"
                    "new Promise((done) => setTimeout(done, 200))"
                )
            (folder / name).write_bytes(browser.screenshot())
            print(folder / name)


if __name__ == "__main__":
    main()
