"""report.html: what a run came to, in one file that loads nothing; a stranger's folder stays data in it."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest

from lit_qlora.cli import main
from lit_qlora.figures.charts import charts, peak_of
from lit_qlora.figures.report import report_page, write_report
from lit_qlora.storage.run import RunFolder

HOSTILE = "<script>document.title='stolen'</script><img src=//evil.example/x onerror=alert(1)>{{ 7*7 }}&lt;"
FIGURES = {
    0: {"val/loss": 2.0, "val/perplexity": 7.39, "val/accuracy": 0.5, "memory/host_gib": 0.25},
    10: {
        "train/loss": 1.0, "train/accuracy": 0.6, "train/learning_rate": 2e-4, "train/gradient_norm": 0.5,
        "speed/tokens_per_second": 1000.0, "speed/padding_share": 0.02,
    },
    20: {
        "train/loss": 0.5, "train/accuracy": 0.8, "train/learning_rate": 1e-4, "train/gradient_norm": 0.25,
        "speed/tokens_per_second": 1200.0, "speed/padding_share": 0.04, "val/loss": 0.75, "val/perplexity": 2.12,
        "val/accuracy": 0.75, "memory/host_gib": 0.5, "memory/train_reserved_gib": 9.5,
        "memory/load_reserved_gib": 4.0, "memory/predicted_reserved_gib": 9.75,
        "samples/ended": 1.0, "samples/cut": 0.0, "samples/max_new_tokens": 48.0,
    },
}  # fmt: skip


def answer(text, cut_by=None):
    return {"text": text, "cut_by": cut_by}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "mine")
    run.adapter.mkdir(parents=True)
    run.metrics.write_text("".join(json.dumps({"step": step, **line}) + "\n" for step, line in FIGURES.items()))
    rows = [{"prompt": "Who?", "base": answer("and so on", "samples/cut"), "adapter": answer("Silas.")}]
    run.samples.write_text(json.dumps({"step": 20, "max_new_tokens": 48, "answers": rows}) + "\n")
    run.config.write_text("# started 2026-01-01\nmodel:\n  base: demo\n  rank: 4\ndata:\n  source: rows.jsonl\n")
    (run.path / "config.2.yaml").write_text("model:\n  base: demo\n  rank: 4\ndata:\n  source: rows.jsonl\nkeep: 3\n")
    (run.adapter / "result.json").write_text('{"step": 20, "val/loss": 0.75}')
    lines = [["data", "train: 3 left out: no answer within 160 tokens"], ["train", "precision 32-true (no GPU)"]]
    decided = {
        "started": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "lines": lines,
        "training_s": 90,
    }
    run.decisions.write_text(json.dumps(decided))
    run.finished_mark.write_text('{"step": 20, "steps": 20}')
    return run


class _Seen(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)


def text_of(run, monkeypatch=None):
    return _Seen(report_page(run)).text


@pytest.mark.parametrize(
    "words",
    [
        "demo in 4-bit with LoRA, trained on rows.jsonl", "finished at step 20 of 20",
        "Held-out loss, nats per token 0.7500 before: 2.0000", "Held-out token accuracy 75.0% before: 50.0%",
        "Tokens per second 1,200 padding: 3.0%", "GPU memory 9.50 GiB forecast: 9.75 GiB",
        "Training time 90 s", "Who? Base alone and so on cut at the limit With the adapter Silas.",
        "Data train: 3 left out: no answer within 160 tokens", "precision 32-true (no GPU)",
        "start 2: keep: None -> 3", "rank: 4", "torch 2.13.0", "last started 2026-01-02 03:04:05 UTC",
    ],
)  # fmt: skip
def test_what_the_page_says(run, words):
    assert words in text_of(run)


@pytest.mark.usefixtures("draws")
def test_without_matplotlib_the_page_says_what_it_lacks(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = text_of(run)
    assert "matplotlib, which draws them, is not installed; with it, python main.py report does" in text
    assert "finished at step 20 of 20" in text


@pytest.mark.usefixtures("draws")
def test_the_charts_are_there_with_their_words(run):
    pytest.importorskip("matplotlib")
    seen = _Seen(report_page(run))
    assert len([tag for tag, _ in seen.tags if tag == "svg"]) == 6
    for words in (
        "Loss (nats per token)", "training from 1 to 0.5, held-out from 2 to 0.75, best adapter at step 20",
        "Peak memory (GiB)", "loading 4.00, training 9.50, host 0.50, forecast for training 9.75",
        "from 0.0002 to 0.0001", "from 1000 to 1200",
    ):  # fmt: skip
        assert words in seen.text


def test_a_chart_is_drawn_in_the_pages_colours_with_names_of_its_own():
    pytest.importorskip("matplotlib")
    drawn = [chart.svg for chart in charts(FIGURES, 20)]
    names = [name for svg in drawn for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(names) == len({*names})
    for svg in drawn:
        assert svg.startswith('<svg viewBox="0 0 ')
        assert re.findall(r"#[0-9a-f]{6}\b|rgb\(", svg) == []
        assert "var(--ink)" in svg and "DejaVu" not in svg
    assert [chart.svg for chart in charts(FIGURES, 20)] == drawn


def test_lines_stand_where_their_figures_are():
    """The plot's own scale: half of a fall is half of the line's height."""
    pytest.importorskip("matplotlib")
    falling = {step: {"train/learning_rate": 1.0 - step / 100} for step in (0, 50, 100)}
    (chart,) = charts(falling, None)
    (path,) = re.findall(r'<path d="M ([^"]+)"[^>]*style="[^"]*var\(--train\)', chart.svg)
    (x0, y0), (x1, y1), (x2, y2) = ([*map(float, pair.split())] for pair in path.strip().split("L "))
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1), rel=1e-4)
    assert x2 - x0 > 250 and y2 - y0 > 100


@pytest.mark.parametrize("figures", [{}, {5: {"train/loss": 1.0}}, {0: {"mine": 1.0}}])
def test_nothing_to_draw(figures):
    pytest.importorskip("matplotlib")
    assert [*charts(figures, None)] == []


def test_the_highest_of_a_figure():
    assert peak_of(FIGURES, "memory/host_gib") == 0.5
    assert peak_of(FIGURES, "memory/none") is None


@pytest.mark.parametrize(
    "place", ["prompt", "base", "adapter", "lines", "topic", "source", "name", "versions", "changes"]
)
def test_a_stranger_s_text_is_text(run, place):
    if place in ("prompt", "base", "adapter"):
        row = {"prompt": "p", "base": answer("b"), "adapter": answer("a")}
        row[place] = HOSTILE if place == "prompt" else answer(HOSTILE)
        run.samples.write_text(json.dumps({"step": 20, "answers": [row]}) + "\n")
    elif place == "name":
        run.path = run.path.rename(run.path.with_name("<b>mine"))
        run = RunFolder(run.path)
    elif place in ("source", "changes"):
        file = run.config if place == "source" else run.path / "config.2.yaml"
        file.write_text("data:\n  source: " + json.dumps(HOSTILE) + "\n")
    else:
        text = json.dumps(HOSTILE)
        run.decisions.write_text(
            {
                "lines": f'{{"lines": [["data", {text}]]}}',
                "topic": f'{{"lines": [[{text}, "x"]]}}',
                "versions": f'{{"versions": {{{text}: {text}}}, "started": {text}}}',
            }[place]
        )
    seen = _Seen(report_page(run))
    assert "<b>mine" in seen.text if place == "name" else "{{ 7*7 }}" in seen.text
    assert {tag for tag, _ in seen.tags} & {"script", "img", "b"} == set()
    assert not [attrs for _, attrs in seen.tags if {"src", "href", "onerror"} & {*attrs}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", ""), ("metrics.jsonl", "\x00\n[1]\n{}\n"),
        ("metrics.jsonl", '{"step": 1, "val/loss": [1], "train/loss": "nan"}\n{"step": 2, "val/loss": true}\n'),
        ("metrics.jsonl", '{"step": -5}\n{"step": 99999999999999999999999, "val/loss": 1e308}\n'),
        ("samples.jsonl", '{"step": 20, "answers": 3}\n{"step": 20, "answers": [1, {"prompt": 2, "base": 3}]}\n'),
        ("samples.jsonl", '{"step": 20, "answers": [{"prompt": null, "base": {"text": 5, "cut_by": {}}}]}\n'),
        ("config.yaml", "a: [\n"), ("config.yaml", "model: 3\ndata: []\n"), ("config.2.yaml", "- 1\n"),
        ("decisions.json", "["), ("decisions.json", '{"lines": 3, "versions": [], "training_s": "x", "started": 4}'),
        ("decisions.json", '{"lines": [["data"], 4, ["a", 3]], "training_s": 1e999}'),
        ("finished.json", "x"), ("finished.json", '{"step": "a", "steps": {}}'),
        ("adapter/result.json", "[]"), ("adapter/result.json", '{"step": {"a": 1}}'),
    ],
)  # fmt: skip
def test_a_damaged_file_leaves_a_page_without_it(run, name, content):
    (run.path / name).write_text(content)
    assert "Sample answers, before and after" in text_of(run)


def test_a_run_that_has_just_begun(tmp_path):
    run = RunFolder(tmp_path / "new")
    run.path.mkdir()
    run.config.write_text("model:\n  base: demo\n")
    text = text_of(run)
    assert "not finished: recorded up to step 0" in text
    assert "Too few figures" in text and "No samples were answered" in text


def test_the_verb_writes_and_names_the_page(run, capsys, monkeypatch):
    assert main(["report", "--run", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.report}\n"
    assert run.report.read_text(encoding="utf-8") == report_page(run)
    monkeypatch.chdir(run.path.parent)
    run.path.rename(run.path.parent / "runs")
    assert main(["report", "--run", "nowhere"]) == 2
    assert "run: runs/nowhere is no run folder" in capsys.readouterr().err


def test_the_verb_names_what_is_damaged(run, capsys):
    run.metrics.write_bytes(run.metrics.read_bytes() + b'{"step": 9, "val\n\xff\xfe\n[1]\n')
    run.samples.write_bytes(b"null\n")
    run.decisions.write_bytes(b"")
    run.finished_mark.write_bytes(b"[1]")
    run.config.write_bytes(b"\xff")
    first = run.metrics.read_bytes().count(b"\n") - 2
    assert main(["report", "--run", str(run.path)]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert [warning.removeprefix(f"warning: {run.path}/") for warning in warnings[:2]] == [
        f"metrics.jsonl: damaged lines (3, from line {first} on) are left out",
        "samples.jsonl: damaged lines (1, from line 1 on) are left out",
    ]
    assert [warning.partition(";")[0].removeprefix(f"warning: {run.path}/") for warning in warnings[2:]] == [
        "config.yaml is damaged (it is not UTF-8 (byte 0))",
        "finished.json: expected a JSON object, got [1]",
        "decisions.json can't be read: it is empty",
    ]
    assert all("; put " in warning for warning in warnings[2:])


def test_a_page_that_can_t_be_written_is_one_line(run, expect_error):
    run.report.mkdir()
    expect_error(["report", "--run", str(run.path)], "report.html could not be saved", option="run")


def test_a_run_s_own_figures_may_hold_a_flat_line(run):
    pytest.importorskip("matplotlib")
    flat = {step: {"train/loss": 0.0, "speed/tokens_per_second": 0.0, "memory/host_gib": 0.0} for step in (1, 2)}
    assert [chart.title for chart in charts(flat, 1)] == [
        "Loss (nats per token)",
        "Tokens per second",
        "Peak memory (GiB)",
    ]


# In a browser


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("matplotlib")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(run, browser, scheme, width):
    row = {"prompt": HOSTILE + "x" * 500, "base": answer("y" * 500), "adapter": answer(HOSTILE)}
    run.samples.write_text(json.dumps({"step": 20, "answers": [row] * 9}) + "\n")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(write_report(run).resolve().as_uri())
    assert browser.title == "mine | lit-qlora report"
    assert [line for line in browser.get_log("browser") if "favicon" not in line["message"]] == []
    asked = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("file:")} == set()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for colours in browser.execute_script(CONTRASTS):
        assert contrast(*colours) > 3.0, colours
    charts_are = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(charts_are) == 6 and min(charts_are) > 250
    assert browser.execute_script("return document.querySelectorAll('details .question').length") == 5


CONTRASTS = """
const style = (element, name) => getComputedStyle(element)[name]
const card = style(document.querySelector('figure'), 'backgroundColor')
const page = style(document.body, 'backgroundColor')
return [...[...document.querySelectorAll('svg text')].map(text => [style(text, 'fill'), card]),
        ...[...document.querySelectorAll('figcaption, .tile dt')].map(text => [style(text, 'color'), card]),
        ...[...document.querySelectorAll('h1, header .soft, footer')].map(text => [style(text, 'color'), page])]
"""


def contrast(one, other):
    """The contrast of two colours, as the guidelines for accessible pages define it."""

    def light(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        parts = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)
