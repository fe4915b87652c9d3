"""Owns the checks of requests to a page's server: a body is checked in full before the server sees it.

A page sends its fields with their kinds; handwritten requests may hold anything. A refused or failed request is
answered in one line, without a traceback on the owner's terminal. An ASGI middleware; knows no gradio, no model.
"""

import json
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from lit_qlora.errors import UserError
from lit_qlora.secrecy import redact
from lit_qlora.storage.files import parse_json
from lit_qlora.storage.foreign import FLAG, OBJECT, Kind, check, shown, whole, wrong

MAX_BODY_BYTES = 1 << 20
"""Largest request: many times the longest prompt of any base."""

_KINDS = {
    "textbox": Kind("a text, or null", lambda value: isinstance(value, str | None)),
    "number": Kind(
        "a number, or null",
        lambda value: value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max),
    ),
    "checkbox": FLAG,
    "state": Kind("anything", lambda value: True),  # the server has its own
}
"""The kinds of values of the page's components."""

_PAGE_ID = Kind("a page's", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9_-]{1,100}", value)))
_OF_CALL = {"session_hash": _PAGE_ID, "event_id": _PAGE_ID, "fn_index": whole(0, 999)}
_HOST = re.compile(r"[\w.:,\[\] -]{1,300}", re.ASCII)
_HOSTS = (b"host", b"x-forwarded-host", b"x-forwarded-proto")
_POST = "a call of the page"

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Door:
    """The middleware.

    Args:
        app: the server behind it, an ASGI application.
        fields: kinds of the inputs (keys of `_KINDS`) of each function of the page, by its number.
    """

    def __init__(self, app: Any, fields: Mapping[int, Sequence[str]]) -> None:
        self.app, self.fields = app, fields

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = list[str]()

        async def watched(message: Message) -> None:
            begun.append(message["type"])
            await send(message)

        try:
            _check_hosts(scope)
            if scope["method"] == "POST":
                receive = self._checked(scope, await _body(receive), receive)
            await self.app(scope, receive, watched)
        except Exception as error:
            status, problem = 400, str(error)
            is_refusal = hasattr(error.__cause__, "status_code")  # the server's, in a stream that it had begun
            if not isinstance(error, UserError) and not is_refusal:
                status, problem = 500, "this request can't be served"
                place = shown(f"{scope['method']} {scope['path']}")
                print(f"web: {place} failed: {redact(shown(f'{type(error).__name__}: {error}'))}", file=sys.stderr)
            await (send({"type": "http.response.body"}) if begun else _answer(send, status, problem))

    def _checked(self, scope: Message, body: bytes, receive: Receive) -> Receive:
        """The body for the server: ``body``, reduced to what a page sends. Raises UserError."""
        parent, last = ["", *scope["path"].rstrip("/").split("/")][-2:]
        if last in ("cancel", "reset"):
            call = check_end(body)
        elif parent == "run" or (parent, last) == ("queue", "join"):
            call = check_call(body, self.fields)
        else:  # the server has more routes, for programs
            raise UserError("what this page's server does is for the page alone")
        body = json.dumps(call).encode()
        kept = [header for header in scope["headers"] if header[0] not in (b"content-length", b"content-type")]
        scope["headers"] = [*kept, *_headers(body)]
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_checked() -> Message:
            return rest.pop() if rest else await receive()

        return receive_checked


def check_call(body: bytes, fields: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """Check a call of a function of the page.

    Args:
        body: JSON.
        fields: as for `Door`.

    Returns:
        The call, reduced to what a page sends.

    Raises:
        UserError: for anything else.
    """
    call = _object(body)
    known = Kind("a function of the page", lambda value: type(value) is int and value in fields)
    number, session = _checked_value(call, "fn_index", known), _checked_value(call, "session_hash", _PAGE_ID)
    kinds = fields[number]
    values = Kind(f"a list of {len(kinds)} values", lambda value: isinstance(value, list) and len(value) == len(kinds))
    data = _checked_value(call, "data", values)
    for index, (kind, value) in enumerate(zip(kinds, data, strict=True)):
        check(_POST, f"data[{index}]", _KINDS[kind], value)
    data = [None if kind == "state" else value for kind, value in zip(kinds, data, strict=True)]
    return {"fn_index": number, "session_hash": session, "data": data}


def check_end(body: bytes) -> dict[str, Any]:
    """Check a request to end a stream.

    Args:
        body: JSON.

    Returns:
        The names of the stream.

    Raises:
        UserError: for anything else.
    """
    call = _object(body)
    return {name: _checked_value(call, name, kind) for name, kind in _OF_CALL.items() if name in call}


def _checked_value(call: Mapping[str, Any], name: str, kind: Kind) -> Any:
    check(_POST, name, kind, call.get(name))
    return call.get(name)


def _object(body: bytes) -> dict[str, Any]:
    try:
        call = parse_json(body)
    except ValueError as error:
        raise wrong(_POST, "its body", "JSON", body[:80].decode(errors="replace")) from error
    check(_POST, "its body", OBJECT, call)
    return dict(call)


def _check_hosts(scope: Message) -> None:
    """Raises UserError for an invalid header from which the server derives its own address."""
    for name, value in scope["headers"]:
        if name in _HOSTS and not _HOST.fullmatch(value.decode("latin-1")):
            raise UserError(f"expected the name of a host, got {shown(value.decode('latin-1'))}", place=name.decode())


async def _body(receive: Receive) -> bytes:
    """The body of a request. Raises UserError for one that no page sends."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise UserError(f"a request: expected at most {MAX_BODY_BYTES:,} bytes", remedy="ask in fewer words")
        if not message.get("more_body"):
            break
    return body


async def _answer(send: Send, status: int, problem: str) -> None:
    content = json.dumps({"detail": problem, "error": problem}).encode()
    await send({"type": "http.response.start", "status": status, "headers": _headers(content)})
    await send({"type": "http.response.body", "body": content})


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    """Headers of a message whose ``body`` is JSON."""
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
