"""The report in a real browser: keys, pointer, search and filter work, and axe finds nothing serious."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import axe_core_python
import pytest

from tests.jobs.report.small_night import record, tell, whole_night

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>
const maps = [...document.querySelectorAll("[data-map]")], svg = maps[0].querySelector("svg");
maps[0].focus();
maps[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
const byKey = document.getElementById("told").textContent, marked = document.querySelectorAll(".on").length;
const circle = svg.querySelector("circle"), at = circle.getBoundingClientRect();
circle.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x + 1, clientY: at.y + 1, bubbles: true }));
const byPointer = document.querySelector(".tip").textContent;
const find = document.getElementById("find");
find.value = "Film 3"; find.dispatchEvent(new Event("input"));
const found = document.getElementById("told").textContent;
const only = document.getElementById("only");
only.value = "0"; only.dispatchEvent(new Event("change"));
const dim = document.querySelectorAll(".dim").length;
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify({ byKey, byPointer, marked, found, dim,
  evil: window.evil === undefined, focused: document.activeElement === maps[0],
  wide: document.documentElement.scrollWidth <= window.innerWidth, errors: window.errors });
parent.document.body.append(out);
</script>
</body>"""
ERRORS = "<script>window.errors = []; window.onerror = message => window.errors.push(message);</script></head>"
AXE = """
<script>{axe}</script>
<script>
axe.run(document, {{ resultTypes: ["violations"] }}).then(found => {{
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({{ passes: found.passes.length, serious: found.violations.filter(
    one => one.impact === "serious" || one.impact === "critical").map(one => one.id + ": " + one.nodes[0].html) }});
  parent.document.body.append(out);
}});
</script>
</body>"""


def browse(html: str, folder: Path, width: int, *more: str) -> dict[str, Any]:
    """What a script in a page found, as headless Chromium runs it in a frame of this width: no window is as narrow as a phone."""
    page = folder / "framed.html"
    page.write_text(
        f'<!DOCTYPE html><body><iframe style="width: {width}px; height: 900px" srcdoc="{escape(html)}"></iframe></body>'
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1300,1000",
        f"--user-data-dir={folder / 'profile'}", *more, "--dump-dom", f"file://{page}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found: dict[str, Any] = json.loads(unescape(re.search(r'(?s)<pre id="probe">(.*?)</pre>', dom)[1]))  # type: ignore[index]
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_in_a_real_browser_keys_pointer_search_and_filter_work_and_nothing_overflows(tmp_path: Path, width: int) -> None:
    whole_night(tmp_path)
    _, html = tell(tmp_path)
    seen = browse(html.replace("</head>", ERRORS).replace("</body>", PROBE), tmp_path, width)
    assert seen["errors"] == []
    assert seen["evil"], "markup in a title must not run"
    for told in ("byKey", "byPointer"):
        assert re.fullmatch(r"(Film \d+|<script>.*) \((Drama|Comedy|Action)\)", seen[told]), told
    assert seen["marked"] == 3, "the item is marked in all three maps"
    assert seen["found"].startswith("11 items: Film 3")
    assert 70 < seen["dim"] < 90, "two of three genres"
    assert seen["focused"]
    assert seen["wide"], "the page does not scroll sideways"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("colours", [[], ["--force-dark-mode"]], ids=["light", "dark"])
def test_axe_finds_nothing_serious_in_light_or_dark(tmp_path: Path, colours: list[str]) -> None:
    whole_night(tmp_path)
    record(tmp_path, "lookup", None, status="failed", error="store is down")
    _, html = tell(tmp_path)
    html = html.replace("<details>", "<details open>")
    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
    seen = browse(html.replace("</body>", AXE.format(axe=axe)), tmp_path, 1280, "--virtual-time-budget=60000", *colours)
    assert seen["passes"] > 20, "it looked"
    assert seen["serious"] == []
