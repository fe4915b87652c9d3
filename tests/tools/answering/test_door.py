"""What visitors send to a page's server: a call is what a page sends, or is refused in one line."""

import asyncio
import json

import pytest

from lit_qlora.tools.answering.door import MAX_BODY_BYTES, Door

FIELDS = {0: ["state", "textbox", "number", "checkbox"], 3: []}
GOOD = {"fn_index": 0, "session_hash": "a1", "data": [None, "hi", 0.5, True]}


def ask(body=b"", path="/gradio_api/queue/join", method="POST", app=None, headers=(), pieces=1):
    """Status and text of the answer, and the JSON that the server behind the door got."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = max(1, -(-len(content) // pieces))
    cut = [content[start : start + step] for start in range(0, len(content), step)] or [b""]
    rest = [{"type": "http.request", "body": piece, "more_body": True} for piece in cut]
    rest[-1]["more_body"] = False
    sent, seen = [], []

    async def receive():
        return rest.pop(0) if rest else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def server(scope, receive, send):
        if scope["method"] == "POST":
            seen.append(json.loads((await receive())["body"]))
            assert dict(scope["headers"])[b"content-length"] == str(len(json.dumps(seen[-1]))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(Door(app or server, FIELDS)(scope, receive, send))
    starts = [message["status"] for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    assert "\n" not in text
    return starts[0], text, seen[0] if seen else None


def test_of_a_call_only_what_a_page_sends_goes_in():
    more = {"event_data": {"a": 1}, "trigger_id": 1, "event_id": "x", "batched": True, "simple_format": True}
    assert ask(GOOD | more | {"data": [{"path": "/etc/passwd"}, "hi", None, True]})[::2] == (
        200,
        {"fn_index": 0, "session_hash": "a1", "data": [None, "hi", None, True]},
    )
    assert ask({"fn_index": 3, "session_hash": "a1", "data": []}, "/gradio_api/run/predict", pieces=5)[0] == 200
    assert ask({"event_id": "e", "session_hash": "s", "fn_index": 0, "x": 1}, "/gradio_api/cancel")[2] == {
        "session_hash": "s", "event_id": "e", "fn_index": 0
    }  # fmt: skip
    assert ask(method="GET", path="/config")[:2] == (200, "fine")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 200_000 + b"]" * 200_000, "expected JSON"),
        (b'{"fn_index": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b"[]", "expected a JSON object, got []"),
        (GOOD | {"fn_index": None}, "fn_index: expected a function of the page, got null"),
        (GOOD | {"fn_index": 7}, "fn_index"),
        (GOOD | {"fn_index": True}, "fn_index"),
        (GOOD | {"fn_index": [0]}, "fn_index"),
        (GOOD | {"session_hash": None}, "session_hash"),
        (GOOD | {"session_hash": "a b"}, "session_hash"),
        ({"fn_index": 0, "session_hash": "a"}, "data: expected a list of 4 values, got null"),
        (GOOD | {"data": [None, "hi", 0.5]}, "data: expected a list of 4 values"),
        (GOOD | {"data": {"0": 1}}, "data: expected a list of 4 values"),
        (GOOD | {"data": [None, 5, 0.5, True]}, "data[1]: expected a text, or null, got 5"),
        (GOOD | {"data": [None, {"path": "x"}, 0.5, True]}, "data[1]: expected a text"),
        (GOOD | {"data": [None, "hi", "0.5", True]}, "data[2]: expected a number"),
        (GOOD | {"data": [None, "hi", True, True]}, "data[2]: expected a number"),
        (GOOD | {"data": [None, "hi", float("nan"), True]}, "data[2]: expected a number, or null, got NaN"),
        (GOOD | {"data": [None, "hi", float("-inf"), True]}, "data[2]: expected a number"),
        (GOOD | {"data": [None, "hi", 10**400, True]}, "data[2]: expected a number"),
        (GOOD | {"data": [None, "hi", 0.5, 1]}, "data[3]: expected true or false, got 1"),
        (GOOD | {"data": [None, "x" * MAX_BODY_BYTES, 0.5, True]}, "expected at most 1,048,576 bytes"),
    ],
    ids=range(23),
)
def test_any_other_call_is_one_line(body, words):
    status, text, seen = ask(body, pieces=3)
    assert (status, seen) == (400, None)
    assert words in json.loads(text)["detail"]
    assert len(text) < 500


@pytest.mark.parametrize(
    "path", ["call/_ask", "call/v2/_ask", "upload", "component_server", "vibe-edit/", "api/predict"]
)
def test_what_a_page_never_posts_to_is_closed(path):
    assert ask(GOOD, f"/gradio_api/{path}")[::2] == (400, None)


def test_names_of_what_is_to_be_ended_are_names():
    assert "event_id: expected" in ask({"event_id": [1]}, "/gradio_api/reset")[1]


@pytest.mark.parametrize("name", [b"host", b"x-forwarded-host", b"x-forwarded-proto"])
def test_a_host_is_the_name_of_one(name):
    assert ask(GOOD, headers=[(name, b"a/b?c")])[0] == 400
    assert ask(GOOD, headers=[(name, b"[::1]:7860")])[0] == 200


def test_what_fails_behind_it_is_one_line_on_either_side(capsys):
    async def fails(scope, receive, send):
        raise KeyError("/predict\n\x1b[2J")

    assert json.loads(ask(method="GET", path="/x\n", app=fails)[1])["detail"] == "this request can't be served"
    assert capsys.readouterr().err == 'web: "GET /x\\n" failed: "KeyError: \'/predict\\\\n\\\\x1b[2J\'"\n'


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_stream_that_fails_is_ended(is_answered, capsys):
    class AnsweredError(Exception):
        status_code = 404

    async def fails(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("response already started") from (AnsweredError() if is_answered else None)

    assert ask(method="GET", path="/queue/data", app=fails)[:2] == (200, "half")
    assert capsys.readouterr().err.count("\n") == (0 if is_answered else 1)
