"""A real browser: headless Chromium shows a page in a frame of a given width, and a script looks at it."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--enable-logging=stderr", "--v=0"),
)
# The page sits in a frame, because a window of Chromium is at least 500 pixels wide.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="width:%dpx;height:900px;border:0" src="%s"></iframe><pre id="found"></pre>
<script>
document.getElementById("frame").addEventListener("load", event => {
  const page = event.target.contentDocument, view = event.target.contentWindow;
  let found;
  try { found = (%s)(page, view); } catch (error) { found = {failed: String(error)}; }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def look(page: Path, script: str, width: int, folder: Path) -> tuple[Any, list[str]]:
    """What the function `script` of (document, window) returns, and what the browser's console complained of."""
    frame = folder / "frame.html"
    frame.write_text(FRAME % (width, page.resolve().as_uri(), script), encoding="utf-8")
    assert CHROMIUM is not None
    shown = subprocess.run(
        [CHROMIUM, *QUIET, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=5000", "--window-size=1300,900", "--dump-dom", frame.resolve().as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, f"the browser showed nothing:\n{shown.stdout[:500]}\n{shown.stderr[-2000:]}"
    assert found[1], f"the page did not load:\n{shown.stderr[-2000:]}"
    complaints = [line for line in shown.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    return json.loads(unescape(found[1])), complaints
