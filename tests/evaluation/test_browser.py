"""The report in a real browser: nothing is fetched, nothing complains, and sorting works. Skipped without Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.data.tiny import tiny_packed
from tests.evaluation.run_maker import make_run
from vitdist.evaluation.report import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--disable-features=NetworkTimeServiceQuerying", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
]
SORT_BY_RECALL = """<script>addEventListener("load", () => {
  [...document.querySelectorAll("table.sortable th")].find((head) => head.textContent === "recall").click();
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    index = tiny_packed(folder / "set", num_classes=30, train_per_class=1, test_per_class=5, size=64)
    return build_report(make_run(folder / "a run <b>", index, skill=1.5))


def _browse(page: Path, tmp_path: Path, *more: str) -> tuple[str, str, list[str]]:
    """(what the browser wrote, what pages complained of, addresses it asked for beside files)."""
    assert CHROMIUM is not None
    log = tmp_path / "net.json"
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        *more,
        page.as_uri(),
    ]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]
    urls = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    asked = sorted(url for url in urls if url.startswith(("http", "ws", "ftp")))
    complaints = [line for line in outcome.stderr.splitlines() if ":CONSOLE" in line]
    return outcome.stdout, "\n".join(complaints), asked


def _of_the_browser(url: str) -> bool:
    """Whether Chromium asks for this by itself, whatever it shows: updates, the time, accounts."""
    host = urlsplit(url).netloc
    services = ("update", "optimizationguide-pa", "content-autofill", "safebrowsing")
    return host.endswith(".google.com") or host in {f"{service}.googleapis.com" for service in services}


def _brightness(page: Path, tmp_path: Path, *more: str) -> float:
    shot = tmp_path / "shot.png"
    _browse(page, tmp_path, f"--screenshot={shot}", "--window-size=1200,900", *more)
    return float(np.asarray(Image.open(shot).convert("L")).mean())


def test_nothing_is_fetched_and_nothing_complains(page: Path, tmp_path: Path) -> None:
    _, complaints, asked = _browse(page, tmp_path, "--dump-dom")
    assert complaints == "" and [url for url in asked if not _of_the_browser(url)] == []


def test_the_browser_would_have_told(page: Path, tmp_path: Path) -> None:
    """The control: with the policy taken away, a picture from elsewhere is seen by both checks."""
    text = page.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-none")
    other = page.with_name("other.html")
    other.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/a.png"><script>throw 1</script>'))
    _, complaints, asked = _browse(other, tmp_path, "--dump-dom")
    other.unlink()
    assert "Uncaught 1" in complaints and "http://127.0.0.1:9/a.png" in asked


def test_the_policy_stops_what_slipped_in(page: Path, tmp_path: Path) -> None:
    other = page.with_name("other.html")
    other.write_text(page.read_text(encoding="utf-8").replace("<main>", '<main><img src="http://127.0.0.1:9/a.png">'))
    _, complaints, asked = _browse(other, tmp_path, "--dump-dom")
    other.unlink()
    assert "Content Security Policy" in complaints and not [url for url in asked if "127.0.0.1" in url]


def test_a_click_sorts_the_classes(page: Path, tmp_path: Path) -> None:
    other = page.with_name("other.html")
    text = page.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-none")
    other.write_text(text.replace("</body>", SORT_BY_RECALL + "</body>"))
    dom, _, _ = _browse(other, tmp_path, "--dump-dom")
    other.unlink()
    body = dom.split('class="sortable"')[1].split("<tbody>")[1].split("</tbody>")[0]
    recalls = [float(row.split('data-v="')[1].split('"')[0]) for row in body.split("<tr>")[1:]]
    assert len(recalls) == 30 and recalls == sorted(recalls, reverse=True) and recalls[0] > recalls[-1]


def test_light_and_dark_follow_the_reader(page: Path, tmp_path: Path) -> None:
    assert _brightness(page, tmp_path) > 200
    assert _brightness(page, tmp_path, "--blink-settings=preferredColorScheme=0") < 60
