"""What stands between the pages and the rest of the web: who may ask, and what a page may do."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 64 * 1024

# Nothing inline and nothing from elsewhere: a token that slipped through the escaping could still not run.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def host_name(host: str) -> str:
    """The name in a Host header, without its port.

    >>> host_name("LocalHost:8000"), host_name("[::1]:8000"), host_name("")
    ('localhost', '::1', '')
    """
    try:
        return (urlsplit("//" + host).hostname or "").lower()
    except ValueError:
        return ""


class Guard:
    """ASGI middleware: known host names only, changes from these pages only, small bodies, strict headers.

    A page elsewhere whose name is made to point at this machine (DNS rebinding) sends its own name in
    `Host` and is refused. `hosts` may hold "*" to allow every name.
    """

    def __init__(self, app: Any, hosts: list[str] | None = None) -> None:
        self.app = app
        self.hosts = {h.lower() for h in (*LOCAL, *(hosts or ()))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if refused := self.refusal(scope["method"], sent):
            await _answer(send, *refused)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        await self.app(scope, receive, answer)

    def refusal(self, method: str, sent: dict[str, str]) -> tuple[int, str] | None:
        """Why a request is not let in: status and message; None if it is."""
        name = host_name(sent.get("host", ""))
        if "*" not in self.hosts and name not in self.hosts:
            return 400, f"This explorer does not answer to the host name {name!r}."
        if method in {"GET", "HEAD"}:
            return None
        origin = sent.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != sent.get("host", "").lower()
        if foreign or sent.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
            return 403, "Requests that do something are taken from this explorer's own pages only."
        length = sent.get("content-length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return 413, f"A request's body must say its length and be at most {LARGEST_BODY} bytes."
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        *HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
