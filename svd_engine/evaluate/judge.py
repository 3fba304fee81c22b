"""Judge: asks an OpenAI-compatible endpoint a question and returns yes or no."""

import asyncio
import json
import os
import re
from dataclasses import dataclass, field

import httpx2

URL, MODEL, KEY = "SVD_JUDGE_URL", "SVD_JUDGE_MODEL", "SVD_JUDGE_KEY"
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled after every attempt
TIMEOUT = 120.0  # of one attempt
DEADLINE = 600.0  # of one question, with its pauses
LARGEST = 1 << 20  # bytes of a reply

_REPLY = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Judge:
    """An endpoint that answers `POST <url>/chat/completions`."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> "Judge | None":
        """Return the judge of SVD_JUDGE_URL, _MODEL and, if needed, _KEY; None without a URL."""
        url, model, key = (os.environ.get(name) for name in (URL, MODEL, KEY))
        if not url:
            return None
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"{URL} must begin with http:// or https://; got {url!r}.")
        if not model:
            raise ValueError(f"{URL} is set; set {MODEL} to the name of the judge's model too.")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY} has characters that no HTTP header may have.")
        return cls(url.rstrip("/"), model, key)

    def client(self) -> httpx2.AsyncClient:
        """Open a client for `ask`. It sends the key to this endpoint and to no other."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.AsyncClient(headers=headers, timeout=TIMEOUT, follow_redirects=False)

    async def ask(self, client: httpx2.AsyncClient, prompt: str) -> bool:
        """Return the judge's yes or no; retry failures and unclear replies after growing pauses.

        Raises ValueError after ATTEMPTS, after DEADLINE seconds, or where a retry would not help.
        """
        problem = "no reply."
        try:
            async with asyncio.timeout(DEADLINE):
                for attempt in range(ATTEMPTS):
                    wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
                    try:
                        reply = await self._post(client, prompt)
                        if said := _REPLY.match(reply.rpartition("</think>")[2]):
                            return said[1].lower() == "yes"
                        problem = f"neither yes nor no: {reply[:200]!r}"
                    except _StatusError as error:
                        problem = str(error)
                        if not error.is_passing:
                            break
                        wait = min(_seconds(error.retry_after, wait), LONGEST_WAIT)
                    except _FAILURES as error:
                        problem = f"{type(error).__name__}: {error}"
                    if attempt + 1 < ATTEMPTS:
                        await asyncio.sleep(wait)
        except TimeoutError:
            problem = f"{DEADLINE:g} seconds are over; last: {problem}"
        if self.key:
            problem = problem.replace(self.key, f"<{KEY}>")
        raise ValueError(
            f"the judge {self.model!r} at {self.url} gave no verdict: {problem} "
            "The verdicts so far are kept; run it again to go on."
        )

    async def _post(self, client: httpx2.AsyncClient, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        async with (
            asyncio.timeout(TIMEOUT),
            client.stream("POST", f"{self.url}/chat/completions", json=body) as response,
        ):
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > LARGEST:
                    raise ValueError(f"the reply is longer than {LARGEST} bytes.")
        if response.status_code != 200:
            raise _StatusError(response, content)
        return str(json.loads(content)["choices"][0]["message"]["content"])


class _StatusError(Exception):
    """A reply with another status than 200."""

    def __init__(self, response: httpx2.Response, content: bytes) -> None:
        code = response.status_code
        said = content[:500].decode(errors="replace")
        if response.is_redirect:
            said = f"to {response.headers.get('Location')}; redirects are not followed."
        super().__init__(f"HTTP {code}: {said}")
        self.is_passing = code == 429 or code >= 500
        self.retry_after = response.headers.get("Retry-After")


# Of the connection, of time, and of what a reply contains
_FAILURES = (httpx2.HTTPError, OSError, ValueError, LookupError, TypeError, RecursionError)


def _seconds(value: str | None, default: float) -> float:
    try:
        return max(0.0, float(value)) if value is not None else default
    except ValueError:
        return default  # a date
