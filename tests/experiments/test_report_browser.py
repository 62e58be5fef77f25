"""The report in a browser: no wider than its window, on a phone and a desk, in light and dark."""

import importlib.util
import pathlib
import shutil
import subprocess

import pytest

from experiments import report
from experiments.common.claims_all import every
from tests.experiments.test_report import RESULTS

WIDTHS = (360, 1280)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A window is never as narrow as a phone: the page is shown in frames, each of which tells its host.
MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const boxes = [...document.querySelectorAll("p, pre, h1, h2, h3, dl, .label, .scroll, figure")];
  const right = Math.max(...boxes.map((b) => b.getBoundingClientRect().right));
  const back = getComputedStyle(document.body).backgroundColor;
  const told = [innerWidth, root.clientWidth, root.scrollWidth, Math.ceil(right), dark, back];
  parent.postMessage(told.join(";"), "*");
})</script>"""
HOST = """<!doctype html><body>{frames}<pre id="told"></pre><script>
addEventListener("message", (e) => {{ document.querySelector("#told").append(e.data + "|"); }});
</script></body>"""


def browser():
    """A Chromium: playwright's, or one on PATH; None where there is none."""
    if importlib.util.find_spec("playwright"):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as p:
            path = pathlib.Path(p.chromium.executable_path)
        if path.is_file():
            return str(path)
    return next((found for n in NAMES if (found := shutil.which(n))), None)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A page with the report in a frame of each width."""
    folder = tmp_path_factory.mktemp("report")
    page = report.made(RESULTS, folder / "page", every()).html
    (folder / "page.html").write_text(page.replace("</body>", f"{MEASURE}</body>"))
    frames = "".join(f'<iframe src="page.html" width={w} height=800></iframe>' for w in WIDTHS)
    path = folder / "host.html"
    path.write_text(HOST.format(frames=frames.replace("<iframe", '<iframe style="border:0"')))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_no_wider_than_its_window(host, dark):
    program = browser()
    if program is None:
        pytest.skip("no Chromium: neither playwright's nor one on PATH")
    line = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={host.parent / 'profile'}", "--window-size=1400,900",
        "--virtual-time-budget=10000", *(["--force-dark-mode"] if dark else []), "--dump-dom",
        host.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stdout
    told = shown.split('<pre id="told">')[1].split("</pre>")[0].strip("|").split("|")
    found: set[int] = set()
    for words in told:
        window, inside, width, right, scheme, back = words.split(";")
        found.add(int(window))
        assert int(width) <= int(inside) <= int(window)  # inside: less the bar to scroll by
        assert int(right) <= int(inside)
        assert scheme == ("true" if dark else "false")
        assert back == ("rgb(21, 24, 28)" if dark else "rgb(253, 253, 252)")
    assert found == {*WIDTHS}
