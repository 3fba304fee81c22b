"""Judge: asks an OpenAI-compatible endpoint a question and returns yes or no."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

URL, MODEL, KEY = "SVD_JUDGE_URL", "SVD_JUDGE_MODEL", "SVD_JUDGE_KEY"
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled after every attempt
TIMEOUT = 120.0

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
        url, model = os.environ.get(URL), os.environ.get(MODEL)
        if not url:
            return None
        if not model:
            raise ValueError(f"{URL} is set; set {MODEL} to the name of the judge's model too.")
        return cls(url.rstrip("/"), model, os.environ.get(KEY))

    def ask(self, prompt: str) -> bool:
        """Return the judge's yes or no; retry failures and unclear replies after growing pauses."""
        problem = ""
        for attempt in range(ATTEMPTS):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            try:
                reply = self._post(prompt)
                if said := _REPLY.match(reply.rpartition("</think>")[2]):
                    return said[1].lower() == "yes"
                problem = f"neither yes nor no: {reply[:200]!r}"
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break  # a retry would not help
                wait = min(_seconds(error.headers.get("Retry-After"), wait), LONGEST_WAIT)
            except (OSError, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait)
        raise ValueError(
            f"the judge {self.model!r} at {self.url} gave no verdict: {problem} "
            "The verdicts so far are kept; run it again to go on."
        )

    def _post(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])


def _seconds(value: str | None, default: float) -> float:
    try:
        return max(0.0, float(value)) if value is not None else default
    except ValueError:
        return default  # a date
