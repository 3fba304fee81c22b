"""`svd-engine serve` as a process, and a client of it that counts and times tokens."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from benchmarks.records import ROOT

COMPLETIONS = "/v1/completions"


class Server(NamedTuple):
    url: str
    process: int

    def client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=self.url, timeout=600, limits=limits)

    @property
    def memory(self) -> int:
        """Resident memory in MiB."""
        status = Path(f"/proc/{self.process}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) // 1024


@contextmanager
def serve(base: str | Path, adapter: Path, *options: str) -> Iterator[Server]:
    """Run a server in float32 until the block ends."""
    command = [
        sys.executable, "-m", "svd_engine.cli.main", "serve", "--base", str(base), "--adapter",
        str(adapter), "--strength", "-4", "--dtype", "float32", "--port", "0", *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            assert found is not None
            yield Server(found[0], process.pid)
        finally:
            process.terminate()


async def complete(client: httpx2.AsyncClient, prompt: list[int], tokens: int) -> dict[str, Any]:
    """A greedy completion, as the server answers it."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = await client.post(COMPLETIONS, json=body)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


async def stream(
    client: httpx2.AsyncClient, prompt: list[int], tokens: int
) -> AsyncIterator[tuple[float, str]]:
    """Yield the time and the text of each event."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    async with client.stream("POST", COMPLETIONS, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield time.perf_counter(), json.loads(line[6:])["choices"][0]["text"]


async def tokens_per_second(server: Server, prompts: list[list[int]], new: int) -> float:
    """Tokens of all clients, one for each prompt, over the time until the last has its answer."""
    async with server.client() as client:
        start = time.perf_counter()
        answers = await asyncio.gather(*(complete(client, prompt, new) for prompt in prompts))
        seconds = time.perf_counter() - start
    return float(sum(x["usage"]["completion_tokens"] for x in answers)) / seconds
