"""What a request passes before the app sees it: the key, and the size of its body."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svd_engine.serve import errors

OPEN = ("/health", "/metrics")  # without a key


class Gate:
    """Checks the API key in constant time, and reads at most `max_body` bytes."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self._app, self._max_body = app, max_body
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        is_known = self._expected is None or hmac.compare_digest(given, self._expected)
        if not is_known and scope["path"] not in OPEN:
            return await errors.response(401, "the API key is wrong.")(scope, receive, send)
        body, is_whole = bytearray(), False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body:
                text = f"the body has more than {self._max_body} bytes."
                return await errors.response(413, text)(scope, receive, send)
            is_whole = not message.get("more_body", False)
        read: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def again() -> Message:
            return read.pop() if read else await receive()

        return await self._app(scope, again, send)
