"""The whole way in a browser: draw, follow, correct, run, compare, download. Nothing is fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffmae_video.rendering.source import VideoSource
from tests.studio.scene import COUNT, HEIGHT, WIDTH, write_scene

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
LIMIT = 120
"""Seconds after which something has failed; nothing waits for it."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("selenium") is None, reason="Selenium is not installed"),
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="Chromium and its driver are not installed"),
]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A studio in an empty folder."""
    code = "from diffmae_video.cli.app import main; main()"
    done = subprocess.Popen(
        [sys.executable, "-c", code, "studio", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    output = done.stdout
    threading.Thread(target=lambda: [lines.put(line) for line in output], daemon=True).start()
    try:
        while "The studio is at" not in (line := lines.get(timeout=LIMIT)):
            pass
        yield line.split()[4]
    finally:
        done.terminate()
        done.wait(LIMIT)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
        "--no-first-run", "--disable-dev-shm-usage", "--window-size=1000,1500",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver: Any, condition: Callable[[Any], Any]) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, LIMIT, 0.1, [StaleElementReferenceException, KeyError]).until(condition)


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=LIMIT) as answer:
        return json.load(answer)


def test_something_is_removed_by_hand(address: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    truth = write_scene(tmp_path / "mine.mkv", "ffv1")  # no browser plays this
    browser.get(address)

    def find(name: str) -> Any:
        return wait(browser, lambda driver: driver.find_element(By.CSS_SELECTOR, name))

    def shown(number: int) -> None:
        """Wait until the page has painted the newest state of a frame."""
        place = f"{number}:{read(f'{address}studio/state')['version']}"
        wait(browser, lambda driver: find("#paint").get_attribute("data-shown") == place)

    def go(number: int) -> None:
        script = "const s = document.getElementById('frame'); s.value = arguments[0]; s.oninput();"
        browser.execute_script(script, number)
        shown(number)

    def drag(start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag from one place of the clip to another, in its pixels."""
        canvas = find("#paint")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        size = canvas.size
        points = [
            (round((x / WIDTH - 0.5) * size["width"]), round((y / HEIGHT - 0.5) * size["height"]))
            for x, y in (start, end)
        ]
        before = read(f"{address}studio/state")["version"]
        chain = ActionChains(browser, duration=50).move_to_element_with_offset(canvas, *points[0]).click_and_hold()
        chain.move_to_element_with_offset(canvas, *points[1]).release().perform()
        wait(browser, lambda driver: read(f"{address}studio/state")["version"] > before)

    find("#open input, input[type=file]").send_keys(str(tmp_path / "mine.mkv"))
    wait(browser, lambda driver: f"{WIDTH}x{HEIGHT}, {COUNT} frames" in find("#status").text)
    shown(0)

    find("#run").click()  # nothing is marked
    wait(browser, lambda driver: "Nothing is marked" in find("#status").text)

    go(4)
    rows, columns = (np.flatnonzero(truth[4].any(axis)) for axis in (1, 0))
    drag((columns[0] - 4, rows[0] - 4), (columns[-1] + 4, rows[-1] + 4))
    shown(4)
    assert find("#marked").text == "Marked frames: 4."
    find("#follow").click()
    wait(browser, lambda driver: "Followed through the whole clip" in find("#status").text)
    go(10)
    find("#tool-brush").click()
    drag((5, 5), (25, 5))  # a correction: something more in this frame
    shown(10)
    assert find("#marked").text == "Marked frames: 4, 10."
    browser.save_screenshot(str(tmp_path / "marked.png"))

    find("#run").click()
    wait(browser, lambda driver: "Done in" in find("#status").text)
    command = find("#command").text
    assert command.startswith("diffmae render-inpaint studio/mine/clip.mkv --mask studio/mine/mask.mp4 --dilate 4")
    wait(browser, lambda driver: driver.execute_script("return document.getElementById('result').readyState") >= 2)
    assert browser.execute_script("return document.getElementById('result').videoWidth") == WIDTH
    browser.execute_script("const d = document.getElementById('divider'); d.value = 20; d.oninput();")
    after = find("#studio-compare img.after")
    assert "20%" in after.get_attribute("style")
    wait(browser, lambda driver: driver.execute_script("return arguments[0].naturalWidth", after) == WIDTH)
    browser.save_screenshot(str(tmp_path / "done.png"))
    if os.environ.get("STUDIO_SCREENSHOT"):
        browser.set_window_size(900, 1750)
        go(6)
        browser.execute_script("const d = document.getElementById('divider'); d.value = 37; d.oninput();")
        browser.execute_script("window.scrollTo(0, 0)")
        browser.save_screenshot(os.environ["STUDIO_SCREENSHOT"])

    files = {}
    for name in ("video", "mask"):
        with urllib.request.urlopen(find(f"#download-{name}").get_attribute("href"), timeout=LIMIT) as answer:
            files[name] = tmp_path / f"{name}.mp4"
            files[name].write_bytes(answer.read())
    masks, results, sources = (
        [frame.rgb for frame in VideoSource(path)] for path in (files["mask"], files["video"], tmp_path / "mine.mkv")
    )
    assert len(masks) == len(results) == COUNT
    for number, mask in enumerate(masks):
        found = mask.max(2) > 127
        assert (found & truth[number]).sum() > 0.9 * truth[number].sum()
    inside = truth[8]
    assert results[8][inside].mean() > sources[8][inside].mean() + 40  # the dark ball is gone from the bright place

    addresses = [
        entry["params"]["request"]["url"]
        for entry in (json.loads(line["message"])["message"] for line in browser.get_log("performance"))
        if entry["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.endswith("/studio/frame/4?v=1") for url in addresses)
    others = [
        url for url in addresses if not url.startswith((address, "data:", "blob:", "chrome:", "chrome-extension:"))
    ]
    assert others == []


def test_other_hosts_and_origins_get_nothing(address: str) -> None:
    for headers in ({"Host": "stranger.example"}, {"Origin": "http://stranger.example"}, {"Origin": "null"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{address}studio/state", headers=headers), timeout=LIMIT)
        assert refused.value.code == 403
    assert read(f"{address}studio/state") == {"version": 0, "frames": 0}
