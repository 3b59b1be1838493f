"""Notebooks as a person uses them, by `make test-browser`: JupyterLab in a browser, Run All, a slider that moves."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("0*.ipynb"))
MINUTES = 4 * 60_000  # of a busy machine, in ms
# The page holds all cells, not only the visible ones.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false"},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab with a copy of the notebooks: its address, with {0} for the name of the one to open.

    Each notebook gets its own workspace: the default one would reopen the notebooks of earlier tests behind it.
    """
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, values in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    token = secrets.token_hex(16)
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings"}
    environment = os.environ | {key: str(folder / value) for key, value in places.items()} | {"NOTEBOOK_TINY": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"],
            env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield f"{_address(folder, server)}lab/workspaces/{{0}}/tree/notebooks/{{0}}.ipynb?token={token}"
        finally:
            server.terminate()
            server.wait(30)


def _address(folder: Path, server: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        for path in (folder / "runtime").glob("jpserver-*.json"):
            try:
                return str(json.loads(path.read_text())["url"])
            except ValueError:  # half written
                pass
        time.sleep(0.5)
    pytest.fail("JupyterLab did not start:\n" + (folder / "log").read_text()[-2000:])


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


def open_notebook(page: playwright.Page, address: str) -> None:
    """Open a notebook, and wait for its kernel."""
    page.goto(address, timeout=MINUTES)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=MINUTES)
    idle = "document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')"
    accept = ".jp-Dialog button.jp-mod-accept"  # of the dialog that asks for a kernel, if there is not the notebook's
    page.wait_for_function(f"() => {idle} || document.querySelector('{accept}')", timeout=MINUTES)
    if page.locator(accept).count():
        page.locator(accept).click()
        page.wait_for_function(f"() => {idle}", timeout=MINUTES)


def run_all(page: playwright.Page, address: str) -> None:
    """Open a notebook, run it, wait for its last cell, and check that no cell failed."""
    open_notebook(page, address)
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_text("Clear Outputs of All Cells").click()
    page.wait_for_function("() => !document.querySelector('.jp-OutputArea-output')", timeout=MINUTES)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    done = """() => {
        const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent);
        return prompts.length > 0 && prompts.every(text => /^\\[\\d+\\]:$/.test(text))
            || document.querySelector('[data-mime-type="application/vnd.jupyter.error"]') !== null;
    }"""
    page.wait_for_function(done, timeout=MINUTES)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    assert not errors, errors[0]


def pictures(page: playwright.Page) -> list[str]:
    return page.eval_on_selector_all(".jp-OutputArea img", "images => images.map(image => image.src)")


def test_a_slider_changes_the_figure(lab: str, browser: playwright.Browser) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    run_all(page, lab.format("01-resonance-rope"))
    before = pictures(page)
    assert before
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.scroll_into_view_if_needed(timeout=MINUTES)
    page.screenshot(path=SCREENSHOTS / "01-before.png")
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => JSON.stringify([...document.querySelectorAll('.jp-OutputArea img')].map(i => i.src)) != before",
        arg=json.dumps(before, separators=(",", ":")), timeout=MINUTES,
    )  # fmt: skip
    page.wait_for_timeout(1000)
    page.screenshot(path=SCREENSHOTS / "01-after.png")
    after = pictures(page)
    assert len(set(before) - set(after)) == 1  # only that figure
    page.close()


def test_generation_runs_live(lab: str, browser: playwright.Browser) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    run_all(page, lab.format("03-long-context-generation"))
    assert len(pictures(page)) >= 2
    for number, image in enumerate(page.locator(".jp-OutputArea img").all()):
        image.scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOTS / f"03-{number}.png")
        size = image.bounding_box()
        assert size is not None and size["width"] > 200 and size["height"] > 100
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_figures_and_their_descriptions_show_before_anything_runs(
    lab: str, browser: playwright.Browser, name: str
) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    open_notebook(page, lab.format(name))
    images = page.locator(".jp-OutputArea img")
    committed = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    outputs = [output for cell in committed["cells"] for output in cell.get("outputs", [])]
    texts = [output["metadata"]["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    page.wait_for_function(
        "count => document.querySelectorAll('.jp-OutputArea img').length == count", arg=len(texts), timeout=MINUTES
    )
    shown = [" ".join(line.split()) for line in page.locator(".jp-OutputArea .jp-RenderedHTML small").all_inner_texts()]
    assert texts and shown == [" ".join(text.split()) for text in texts]
    for number, image in enumerate(images.all(), 1):
        image.scroll_into_view_if_needed()
        size = image.bounding_box()
        assert size is not None and size["width"] > 200 and size["height"] > 100
        if number == 1:
            page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.close()
