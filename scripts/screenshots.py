"""Owns the pictures in docs/pictures/, of one fit of the demo: terminal, TensorBoard's first screen, report, chat page.

    python scripts/screenshots.py            # a minute; into docs/pictures/
    python scripts/screenshots.py --to DIR

Needs requirements-dev.txt and requirements-web.txt, selenium, chromium and its driver. Look at what it made.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
LARGEST = 300_000
"""Bytes of a picture."""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
QUESTION = "Who goes everywhere with Silas?"


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="DIR", help="where they are written")
    to = parser.parse_args().to.resolve()
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--to: {error}")
    with tempfile.TemporaryDirectory(prefix="lit_qlora-pictures-") as folder, _browser() as browser:
        here = Path(folder)
        _terminal(here, to / "terminal.svg")
        _report(browser, here / "runs" / "demo" / "report.html", to)
        _tensorboard(browser, here, to / "tensorboard.png")
        _chat(browser, here, to / "chat.png")
    for picture in sorted(to.glob("*.*")):
        print(f"{picture.stat().st_size:>9,}  {picture}")
        assert picture.stat().st_size < LARGEST, f"{picture} is too large"


def _run(here: Path, *args: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, *args]
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def _terminal(here: Path, file: Path) -> None:
    """A whole fit of the demo, as a terminal of 80 columns shows it."""
    from rich.console import Console
    from rich.text import Text

    done = _run(here, str(ROOT / "main.py"), "fit")
    printed, _ = done.communicate()
    assert done.returncode == 0, printed
    lines = printed.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    shown = Text("$ python main.py fit\n" + "\n".join(lines))
    for pattern, style in (
        (r"^\$ .*", "bold"), (r"^ *(load|demo|data|learns|model|train|run)(?=  )", "cyan"),
        (r"\b(best|before)$", "green"),
        (r"^(peak memory|best adapter|report|curves|next)", "bold cyan"),
        (r"(base alone|with the adapter)(?= {5}|$)", "bold"),
    ):  # fmt: skip
        shown.highlight_regex(re.compile(pattern, re.MULTILINE), style)
    console.print(shown)
    svg = console.export_svg(title="lit-qlora")
    file.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S), encoding="utf-8")  # which come from the net


@contextmanager
def _browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def _look(browser: Any, width: int, height: int, scheme: str = "light") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _shoot(browser: Any, file: Path) -> None:
    """What the browser shows, in 128 colours: a third of the bytes."""
    from PIL import Image

    browser.save_screenshot(str(file))
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(128).save(file, optimize=True)


def _report(browser: Any, page: Path, to: Path) -> None:
    for scheme in ("light", "dark"):
        _look(browser, 1200, 1500, scheme)
        browser.get(page.as_uri())
        _shoot(browser, to / f"report-{scheme}.png")


def _tensorboard(browser: Any, here: Path, file: Path) -> None:
    port = _free_port()
    with _run(
        here, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--load_fast", "false"
    ) as server:
        address = f"http://127.0.0.1:{port}/"
        _wait_for(f"{address}data/plugins_listing")
        _wait_for(f"{address}data/runs", lambda found: len(json.loads(found)) > 1)
        _look(browser, 1280, 900)
        browser.get(address)
        _until(lambda: "1 Loss" in browser.execute_script(SEEN), 60)
        time.sleep(4)  # the lines are drawn
        _shoot(browser, file)
        server.terminate()


SEEN = """
const all = root => [...root.querySelectorAll('*')].flatMap(e => e.shadowRoot ? [e, ...all(e.shadowRoot)] : [e])
return all(document).map(e => e.childElementCount ? '' : e.textContent).join(' ')
"""


def _chat(browser: Any, here: Path, file: Path) -> None:
    port = _free_port()
    with _run(here, str(ROOT / "main.py"), "chat", "--web", "--port", str(port)) as server:
        assert server.stdout and "http://" in server.stdout.readline()
        _look(browser, 1100, 800)
        browser.get(f"http://127.0.0.1:{port}/")
        find = browser.find_elements
        _until(lambda: find("css selector", "#question textarea"), 60)
        find("css selector", "#compare input")[0].click()
        time.sleep(2)
        find("css selector", "#question textarea")[0].send_keys(f"{QUESTION}\ue007")
        _until(lambda: find("css selector", "#base .bot"), 60)
        _until(lambda: find("css selector", "#question .submit-button"), 60)
        time.sleep(2)
        _shoot(browser, file)
        server.terminate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(address: str, holds: Any = bool) -> None:
    def answers() -> bool:
        try:
            with urllib.request.urlopen(address) as answer:
                return bool(holds(answer.read()))
        except OSError:
            return False

    _until(answers, 60)


def _until(holds: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.3)


if __name__ == "__main__":
    main()
