"""The page, in a real browser: a user's history, recommendations, and an item's neighbours; and the process from its command."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import axe_core_python
import pytest

from tests.feature_repo.serving.world import Client, publish, push_history, serving

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
const wait = isSo => new Promise(done => { const look = () => isSo() ? done() : setTimeout(look, 20); look(); });
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("load", async () => {
  const seen = await (async () => { PROBE })();
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify({...seen, errors});
  document.body.append(pre);
});
</script>"""


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from tests.feature_repo.serving import world

    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    world.apply(tmp_path)
    publish(tmp_path, seed=1)
    push_history(tmp_path, "u1", ["i3", "i5", "i8"])
    return tmp_path


@pytest.fixture
def client(lake: Path) -> Iterator[Client]:
    with serving(lake, page=True, page_users="u1,u2") as client:
        yield client


def browse(client: Client, probe: str, folder: Path, width: int = 1280) -> dict[str, object]:
    """What a script sees that runs in the page once it has loaded."""
    page = (ROOT / "feature_repo" / "serving" / "page.html").read_text()
    script = PROBE.replace("PROBE", probe)
    import feature_repo.serving.app as app

    probed = folder / "page.html"
    probed.write_text(page.replace("</body>", script + "</body>"))
    kept, app.PAGE = app.PAGE, probed
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--no-first-run"),
        *(
            f"--user-data-dir={folder / 'profile'}",
            "--timeout=30000",
            "--virtual-time-budget=15000",
            "--dump-dom",
            client.url + "/",
        ),
    ]
    try:
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    finally:
        app.PAGE = kept
    import re
    from html import unescape

    found = re.search(r'(?s)<pre id="probe">(.*?)</pre>', dom)
    assert found, dom[-2000:]
    seen: dict[str, object] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_sees_history_recommendations_and_neighbours(client: Client, tmp_path: Path, width: int) -> None:
    seen = browse(
        client,
        """
        await wait(() => document.querySelectorAll("#history li").length);
        document.querySelector("#next button").click();
        await wait(() => document.querySelectorAll("#near li").length);
        return {history: [...document.querySelectorAll("#history button")].map(b => b.textContent),
                next: document.querySelectorAll("#next li").length, near: document.querySelectorAll("#near li").length,
                of: document.querySelector("#of").textContent, first: document.querySelector("#next button").textContent,
                served: document.querySelector("#served").textContent, error: document.querySelector("#error").textContent,
                users: document.querySelectorAll("#users option").length, said: document.querySelector("#said").textContent,
                wide: document.documentElement.scrollWidth <= innerWidth};
        """,
        tmp_path,
        width,
    )
    assert seen["history"] == ["Film i8", "Film i5", "Film i3"]
    assert (seen["next"], seen["near"], seen["users"], seen["error"], seen["errors"]) == (10, 10, 2, "", [])
    assert seen["of"] == f"Nearest to {seen['first']}" and "200 items" in str(seen["served"]) and seen["said"] == "From 3 events"
    assert seen["wide"], "the page does not scroll sideways"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_axe_finds_nothing_serious(client: Client, tmp_path: Path) -> None:
    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text().replace("</script>", "<\\/script>")
    seen = browse(
        client,
        axe
        + """;
        await wait(() => document.querySelectorAll("#history li").length);
        const found = await axe.run();
        const serious = found.violations.filter(one => ["serious", "critical"].includes(one.impact)).map(one => one.id);
        return {passes: found.passes.length, serious};
        """,
        tmp_path,
    )
    assert int(str(seen["passes"])) > 15 and seen["serious"] == []


def script() -> ModuleType:
    """infra/serve.py, which is no package."""
    found = importlib.util.spec_from_file_location("serve", ROOT / "infra" / "serve.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_command_starts_answers_counts_apart_from_others_and_ends_well(lake: Path) -> None:
    serve = script()
    with serve.serving(lake, WORKERS="1") as (url, process):
        answer = serve.ask(url, "/recommend", user_id="u1", k=3, attributes=["title"])
        assert len(answer["items"]) == 3 and answer["fallback"] is None
        for _ in range(19):
            serve.ask(url, "/recommend", history=["i1"], k=3)
        counted_whole(metrics(url), 20)
        assert "llmemb_pointer_sequence 1.0" in metrics(url)
    assert process.wait() == 0


def counted_whole(text: str, requests: int) -> None:
    """Whether the metrics count all requests and no other process's."""
    assert f'llmemb_requests_total{{endpoint="/recommend",outcome="200"}} {requests}.0' in text.splitlines()
    assert "llmemb_store_up 1.0" in text


def metrics(url: str) -> str:
    """What Prometheus reads."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return str(response.read().decode())


def test_what_is_wrong_is_told_before_anything_starts() -> None:
    import os
    import sys

    environment = os.environ | {"LLMEMB_SERVING_ARTIFACTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "feature_repo.serving"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "LLMEMB_SERVING_ARTIFACTS is not set" in done.stderr
