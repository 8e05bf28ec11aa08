"""Pages in a real browser, where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


TRIES = 5


def play(html, script, folder, *options):
    """What a script returns, run in a page after the page's own.

    A window that the browser has not made the active one yet has no focus to give; it is opened
    again.

    Args:
        html: the page.
        script: statements that return something for JSON.
        folder: of the page and of the browser's profile.
        options: of the browser.
    """
    if BROWSER is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    found = f"JSON.stringify([document.hasFocus(), (() => {{ {script} }})()])"
    tail = f"<script>document.body.dataset.found = {found}</script></body>"
    path = folder / "page.html"
    path.write_text(html.replace("</body>", tail))
    for _ in range(TRIES):
        active, found = _shown(path, *options)
        if active:
            return found
    raise AssertionError("the window is never active")


def _shown(path, *options):
    profile = f"--user-data-dir={path.parent / 'profile'}"
    shown = subprocess.run(
        [BROWSER, *QUIET, profile, *options, "--dump-dom", path.as_uri()],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search('data-found="([^"]*)"', shown.stdout)
    assert found, f"the script did not end: {shown.stderr[-2000:]}"
    return json.loads(unescape(found[1]))
