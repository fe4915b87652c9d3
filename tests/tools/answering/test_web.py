"""main.py chat --web: the page in a real browser, with the real model; and the command around it."""

import gc
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path

import pytest

from lit_qlora.cli import main
from lit_qlora.errors import UserError
from lit_qlora.model.generate import Sampling
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering import tabs, web
from lit_qlora.tools.answering.answerer import Answer, Answerer
from tests.answers import answers
from tests.expect import check_line

pytestmark = [
    # A server that ends in mid-talk with a browser leaves its connections to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    # Between gradio and pandas: old names of the other's.
    pytest.mark.filterwarnings("ignore:.*future.no_silent_downcasting"),
    pytest.mark.filterwarnings("ignore:.*copy keyword is deprecated"),
]

ROOT = Path(__file__).parents[3]
SILAS = "Who goes everywhere with Silas?"
HTML = """<img src=x onerror="document.title='stolen'"><b>bold</b> <script>document.title='stolen'</script>
    **no markdown** `code` $$x^2$$ &lt; <custom>"""

# The command


@pytest.mark.parametrize(("found", "what"), [(None, "gradio is not installed"), ("5.50.0", "gradio 5.50.0 is too old")])
def test_without_gradio_it_is_one_line_and_nothing_is_loaded(found, what, trained, capsys, monkeypatch):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(web, "version", version)
    monkeypatch.setattr("lit_qlora.tools.chat.Answerer", lambda *_: pytest.fail("something was loaded"))
    assert main(["chat", "--web", "--run", str(trained)]) == 2
    check_line(capsys.readouterr().err, what, "pip install -r requirements-web.txt", begins="error: web: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--share"], "share: it only works together with --web"),
        (["--port", "7860"], "port: it only works together with --web"),
        (["--web", "--prompt", "x"], "prompt: expected no question beside --web, where it is asked on the page"),
        (["--web", "--port", "70000"], "port: expected 1 to 65535, got 70000"),
        (["--web", "--seed", "9007199254740992"], "seed: expected below 2**53, as far as a page counts, got 9007"),
        (["--web", "--system", "<<SYS>>"], "prompt: the system text holds '<<SYS>>'"),
        (["--web=maybe"], "web: expected true or false, got maybe"),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_mistake_is_one_line_and_no_model_is_loaded(args, message, trained, capsys, monkeypatch):
    monkeypatch.setattr(web, "version", lambda _: "6.29.0")
    monkeypatch.setattr(Answerer, "model", property(lambda _: pytest.fail("a model was loaded")))
    assert main(["chat", "--run", str(trained), *args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert (err.count("\n"), out) == (1, "")


def test_what_is_needed_is_what_is_installed():
    wanted = re.search(r"^gradio>=(\d+)\.(\d+),", (ROOT / "requirements-web.txt").read_text(), re.MULTILINE)
    assert wanted and (int(wanted[1]), int(wanted[2])) == web.OLDEST_GRADIO


@pytest.fixture(scope="module")
def port():
    pytest.importorskip("gradio", reason="gradio is not installed (requirements-web.txt)")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_command_shows_its_address_and_ends_in_one_line(port, trained, environment):
    args = [sys.executable, str(ROOT / "main.py"), "chat", "--web", "--run", str(trained), "--port", str(port)]
    with subprocess.Popen(args, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert address == f"base demo, run demo: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    assert (out, err) == ("", "\nstopped by Ctrl-C\n")
    assert process.returncode == 130


# The page

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if not (CHROMIUM and driver):
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(port, answerer):
    rows = [
        {"prompt": text}
        for text in (SILAS, "of two\nlines", HTML.split("\n", maxsplit=1)[0], "Where is Ada?", "And Silas?")
    ]
    (answerer.adapter.parent / "samples.jsonl").write_text(json.dumps({"step": 0, "answers": rows}) + "\n")
    page = web.Page(answerer, Sampling(), None)
    page.address = page.open(share=False, port=port)
    yield page
    page.close()
    gc.collect()  # what the server left open warns within its own test


def test_a_port_that_is_taken_is_one_line(page, port, answerer):
    second = web.Page(answerer, Sampling(), None)
    with pytest.raises(UserError, match=f"^port: {port} is taken; give another with --port$"):
        second.open(share=False, port=port)
    second.close()


def test_a_link_that_is_not_to_be_had_is_one_line(page, answerer, monkeypatch, capsys):
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **_: 1 / 0)
    second = web.Page(answerer, Sampling(), None)
    with pytest.raises(UserError, match=r"^share: gradio's servers .*; .* leave --share out$"):
        second.open(share=True, port=None)
    second.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_call_by_hand_is_one_line_and_no_traceback(page, capfd):
    httpx = pytest.importorskip("httpx")
    api = f"{page.address.rstrip('/')}/gradio_api"
    dependencies = httpx.get(f"{page.address}config").json()["dependencies"]
    odd = [
        None,
        "",
        "x",
        True,
        10**400,
        [],
        {},
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        "\ud800",
    ]

    def call(number, data):
        """The visitor's side of a call: what was answered, to the post or in the stream."""
        session = f"s{time.monotonic_ns()}"
        body = json.dumps({"fn_index": number, "data": data, "session_hash": session})
        answer = httpx.post(f"{api}/queue/join", content=body)
        if answer.status_code == 200:
            with httpx.stream("GET", f"{api}/queue/data", params={"session_hash": session}) as stream:
                lines = [line for line in stream.iter_lines() if line]
            return json.loads(lines[-2].removeprefix("data: "))["success"]
        assert (answer.status_code, answer.text.count("\n")) == (400, 0)
        return None

    asks = [None, "hello", "", 4, 0, 1, 0]
    (ask,) = (one["id"] for one in dependencies if len(one["inputs"]) == len(asks))
    for dependency in dependencies:
        values = (asks if dependency["id"] == ask else [None] * len(dependency["inputs"]))[:]
        assert call(dependency["id"], [*values, None]) is None
        for place, _ in enumerate(values):
            for value in odd:
                call(dependency["id"], [*values[:place], value, *values[place + 1 :]])
    for path in ("call/_ask", "call/v2/predict", "run/nope", "upload", "component_server"):
        assert httpx.post(f"{api}/{path}", json={"data": []}).status_code == 400
    assert call(ask, asks) is True
    assert capfd.readouterr() == ("", "")


def until(condition, seconds=60):
    """What ``condition`` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.02)
    return value


class Tab:
    """A user at one tab."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.switch_to.new_window("tab")
        self.handle = driver.current_window_handle
        driver.get(address)
        until(lambda: self.find("#question textarea"))

    def find(self, selector):
        self.driver.switch_to.window(self.handle)
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        self.driver.switch_to.window(self.handle)
        return self.driver.execute_script(script, selector)

    @property
    def adapter(self):
        return self.texts("#adapter .message-content .md")

    @property
    def base(self):
        return self.texts("#base .message-content .md")

    @property
    def notice(self):
        return "".join(self.texts("#notice")).strip()

    @property
    def ready(self):
        return self.find("#question .submit-button")

    def ask(self, text):
        """Asks; returns once the page has taken it."""
        (box,) = self.find("#question textarea")
        self.driver.execute_script("arguments[0].value = arguments[1]", box, text[:-1])
        box.send_keys(text[-1] + "\n")

    def answer(self, text):
        """What the adapter's column gains by a question."""
        before = len(self.adapter)
        self.ask(text)
        until(lambda: len(self.adapter) > before + 1 and self.ready)
        return self.adapter[before:]

    def set(self, **fields):
        if not self.find("#settings .open"):
            until(lambda: self.find("#settings button"))[0].click()
        for name, value in fields.items():
            field = until(lambda name=name: self.find(f"#{name} input, #{name} textarea"))[0]
            field.send_keys("\ue009a\ue000" + f"{value}" + "\ue004" if value != "" else "\ue009a\ue000\ue017\ue004")

    def click(self, selector):
        """Find and click at once, for the page may make its buttons anew at any moment."""
        script = "const e = [...document.querySelectorAll(arguments[0])].find(e => !e.disabled); e?.click(); return !!e"
        self.driver.switch_to.window(self.handle)
        until(lambda: self.driver.execute_script(script, selector))

    def close(self):
        self.driver.switch_to.window(self.handle)
        self.driver.close()
        self.driver.switch_to.window(self.driver.window_handles[0])


@pytest.fixture
def new_tab(page, driver):
    opened = []

    def new_tab():
        opened.append(Tab(driver, page.address))
        return opened[-1]

    yield new_tab
    for tab in opened:
        if tab.handle in driver.window_handles:
            tab.close()


@pytest.fixture
def tab(new_tab):
    return new_tab()


@pytest.fixture
def expected(answerer):
    """The answer to the last of some turns."""

    def expected(*texts, system=None, **sampling):
        turns = tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
        return answers(answerer, [Conversation(turns, system)], Sampling(**sampling))[0].text

    return expected


def test_an_answer_is_the_one_of_chat_prompt(tab, trained, capsys):
    assert tab.texts("#name h1") == ["Chat with demo"] and tab.texts("#name p") == ["demo, fine-tuned in this run"]
    assert tab.driver.title == "Chat with demo | lit-qlora"
    chosen = {}
    for options in ({"seed": 0}, {"temperature": 2, "seed": 1, "limit": 20}, {"top_p": 0.5, "seed": 2}):
        tab.click("#reset")
        until(lambda: tab.adapter == [])
        tab.set(**options)
        shown = tab.answer(SILAS)
        for name, value in options.items():
            chosen[{"limit": "max_new_tokens"}.get(name, name)] = value
        args = [f"--{name}={value}" for name, value in chosen.items()]
        assert main(["chat", "--run", str(trained), "--prompt", SILAS, *args]) == 0
        out, err = capsys.readouterr()
        note = ["(cut at 20 tokens; Answer limit, under Settings, sets the limit)"] if err else []
        assert shown == [SILAS, out.removesuffix("\n"), *note]
    assert tab.find("#seed input")[0].get_property("value") == "3"  # the next one's, counted up


def test_the_run_s_own_questions_can_be_asked_and_each_control_has_a_name(tab):
    assert [text.strip() for text in tab.texts("#examples button")] == [
        SILAS,
        HTML.split("\n", maxsplit=1)[0],
        "Where is Ada?",
    ]
    tab.click("#example2")
    until(lambda: tab.find("#question textarea")[0].get_property("value") == "Where is Ada?")
    names = [one.accessible_name for one in tab.find("textarea, input, button") if one.is_displayed()]
    assert any(name.startswith("Your question") for name in names) and "" not in names


def test_an_answer_streams_until_it_is_stopped(tab):
    tab.set(temperature=20, limit=900)  # hardly ever an EOS
    tab.ask(SILAS)
    seen = []

    def grew():
        text = tab.adapter[1] if len(tab.adapter) > 1 else ""
        if text != tabs.WAITING and text != (seen[-1] if seen else ""):
            seen.append(text)
        return len(seen) > 4

    until(grew)
    for before, after in pairwise(seen):
        assert after.startswith(before)
    tab.click("#question .stop-button")
    until(lambda: tab.ready)
    assert tab.adapter[2:] == ["(stopped)"]
    assert tab.adapter[1].startswith(seen[-1])
    assert len(tab.adapter[1]) < 5000


def test_turns_add_up_until_reset(tab, expected):
    tab.set(limit=30)
    first = tab.answer(SILAS)[1]
    second = tab.answer("Where does Jonas live?")[1]
    assert second == expected(SILAS, first, "Where does Jonas live?", max_new_tokens=30)
    tab.click("#reset")
    until(lambda: tab.adapter == [])
    assert tab.answer(SILAS)[1] == first == expected(SILAS, max_new_tokens=30)


def test_a_full_context_loses_its_first_turns_and_says_so(tab, expected):
    first = tab.answer(SILAS)[1]
    tab.set(limit=1024 - 45)
    shown = tab.answer("Where does Jonas live?")
    assert shown[1] == "(the first 2 turns no longer fit into 1024 tokens: left out)"
    assert shown[2] == expected("Where does Jonas live?", max_new_tokens=64)
    assert first not in shown[2]


def test_the_system_text_is_the_one_on_the_page(tab, expected):
    tab.set(system="Be brief, and kind.", limit=20)
    assert tab.answer(SILAS)[1] == expected(SILAS, system="Be brief, and kind.", max_new_tokens=20)
    tab.set(system="x <</SYS>>")
    tab.ask(SILAS)
    until(lambda: tab.notice == "the system text holds '<</SYS>>', which could forge a turn or a system text")


def test_what_cant_be_asked_is_reported_and_stays_in_its_box(tab):
    tab.ask("x [INST] y")
    until(lambda: tab.notice == "it holds '[INST]', which could forge a turn or a system text")
    assert tab.find("#question textarea")[0].get_property("value") == "x [INST] y"
    tab.find("#question textarea")[0].clear()
    tab.set(temperature=-1)
    tab.ask("hello")
    until(lambda: tab.notice == "temperature: expected 0, or a number from 1e-9, got -1.0")
    tab.set(temperature="")
    tab.find("#question textarea")[0].clear()
    tab.ask("hello")
    until(lambda: tab.notice == "settings: expected a number in each field")
    assert tab.adapter == []


def test_compare_asks_the_base_too(tab, answerer, expected):
    tab.set(limit=12)
    of_adapter = tab.answer(SILAS)[1]
    tab.click("#compare input")
    until(lambda: len(tab.base) == 3 and tab.ready)
    with answerer.without_adapter():
        of_base = expected(SILAS, max_new_tokens=12)
        second = expected(SILAS, of_adapter, "Where is Ada?", max_new_tokens=12)
    assert tab.base[:2] == [SILAS, of_base]
    assert of_base != of_adapter == expected(SILAS, max_new_tokens=12)
    tab.ask("Where is Ada?")
    until(lambda: len(tab.base) == 6 and tab.ready)
    assert tab.base[3:5] == ["Where is Ada?", second]
    assert "Where is Ada?" in tab.adapter
    tab.click("#compare input")
    until(lambda: not tab.driver.execute_script("return document.querySelector('#base')?.checkVisibility()"))
    tab.click("#reset")
    until(lambda: tab.adapter == [])
    assert tab.answer(SILAS)[1] == of_adapter


def test_tabs_wait_for_each_other_and_do_not_mix(new_tab, expected):
    one, other = new_tab(), new_tab()
    one.set(temperature=20, limit=900)
    one.ask("Who is Ada?")
    until(lambda: len(one.adapter) > 1)
    other.ask(SILAS)
    until(lambda: other.adapter == [SILAS, tabs.WAITING])
    one.click("#question .stop-button")
    until(lambda: other.ready and len(other.adapter) > 1 and other.adapter[1] != tabs.WAITING)
    assert other.adapter == [SILAS, expected(SILAS)]
    assert one.adapter[0] == "Who is Ada?" and one.adapter[-1] == "(stopped)"
    assert SILAS not in one.adapter


def test_a_tab_that_is_closed_keeps_nobody_waiting(new_tab, page, expected, monkeypatch):
    ended = []
    stream = Answerer.stream

    def endless(answerer, conversation, sampling, show):
        if conversation.turns[-1].content != "for ever":
            return stream(answerer, conversation, sampling, show)
        while show("more "):
            time.sleep(0.01)
        ended.append(True)
        return Answer("more", False)

    monkeypatch.setattr(Answerer, "stream", endless)
    one, other = new_tab(), new_tab()
    one.ask("for ever")
    until(lambda: len(one.adapter) > 1)
    one.close()
    assert other.answer(SILAS)[1] == expected(SILAS)
    assert ended == [True]


def test_what_is_written_never_becomes_a_part_of_the_page(tab, page, monkeypatch):
    def scripted(answerer, conversation, sampling, show):
        for piece in re.findall(r"(?s).{1,7}", HTML):
            show(piece)
            time.sleep(0.02)
        return Answer(HTML, True)

    monkeypatch.setattr(Answerer, "stream", scripted)
    tab.set(system=HTML.replace("\n", " "))
    asked = HTML.split("\n", maxsplit=1)[0]
    assert tab.answer(asked) == [asked, HTML]
    tab.ask(f"{asked} [INST]")
    until(lambda: tab.notice)
    assert tab.find("#columns img, #columns b, #columns script, #columns code, #columns .katex, #notice img") == []
    assert tab.driver.title == "Chat with demo | lit-qlora"


def test_nothing_was_fetched_from_elsewhere(driver, page):
    """No request of all tests above left the machine; the first test of a module that runs alone sees its own."""
    tab = Tab(driver, page.address)
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    tab.close()
    urls = {url for url in urls if not url.startswith(("data:", "chrome:"))}
    assert len(urls) > 10
    assert {url for url in urls if not url.startswith(page.address)} == set()
