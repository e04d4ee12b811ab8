"""Take the pictures of the server's page that docs/ shows: python scripts/screenshot_page.py URL docs

Needs a running `ggtool serve` with two models and Chromium. 1400 pixels wide as at a desk, 390 as on a phone, light and dark.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chromium import BROWSER, Chromium  # tests drive the same browser

_SHOTS = (
    ("page-1400.png", 1400, 900, False),
    ("page-1400-dark.png", 1400, 900, True),
    ("page-390.png", 390, 800, False),
    ("page-390-dark.png", 390, 800, True),
)
_SETTINGS = {"max_tokens": 90, "seed": "4", "surprise": True}


def main() -> None:
    if BROWSER is None:
        sys.exit("no Chromium here; on Debian: apt-get install chromium")
    url, folder = sys.argv[1], Path(sys.argv[2])
    with Chromium() as browser:
        for name, width, height, dark in _SHOTS:
            browser.open(url, width, height=height, dark=dark)
            kept = json.dumps(json.dumps(_SETTINGS))
            browser.evaluate(f"localStorage.clear(); localStorage.setItem('ggtool.settings', {kept})")
            browser.open(url, width, height=height, dark=dark)
            browser.wait_until("models.length > 1 && document.activeElement.id === 'entry'")
            browser.evaluate(
                "document.getElementById('compare').click(); document.getElementById('entry').focus()"
            )
            browser.type("The river rises in the mountains and")
            browser.press("Enter", 13, text="\r")
            browser.wait_until("!stopping && turns.length === 1 && turns[0].answers.length === 2")
            browser.wait_until("document.getElementById('live').textContent.includes('MiB')")
            (folder / name).write_bytes(browser.screenshot())
            print(folder / name)


if __name__ == "__main__":
    main()
