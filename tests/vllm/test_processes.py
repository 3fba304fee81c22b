"""What takes processes of its own: two ranks, and the server with the client of openai."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from svd_engine.integrations.vllm import engine_args
from svd_engine.integrations.vllm.export import export_folder
from tests.tiny import assert_same_tokens, teacher_forced_two_pass
from tests.vllm import models
from tests.vllm.test_engine import REQUESTS, TIE, assert_equal, generate, truth

NEW = 16
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip
# vLLM's CPU worker makes the buffer between stages while it warms up, which it leaves out if eager.
TRACED = {"mode": 2, "backend": "eager"}  # by Dynamo, without Inductor, which takes minutes


@pytest.fixture
def two_processes(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize(("architecture", "adapter"), [("llama", "all"), ("gemma2", None)])
def test_tensor_parallel(vllm, engine, folder_of, prompts, two_processes, architecture, adapter):
    """DoRA on every layer, embeddings and head, and IA3, cut as the weights are."""
    root, model = folder_of(architecture, adapter)
    with engine(**engine_args(root / "base", root / "adapter"), tensor_parallel_size=2) as llm:
        got = generate(vllm, llm, prompts, REQUESTS)
    assert_equal(model, prompts, got, REQUESTS)


@pytest.mark.parametrize(("architecture", "adapter"), [("llama", "all"), ("gemma2", None)])
def test_pipeline_parallel(vllm, engine, folder_of, prompts, two_processes, architecture, adapter):
    """A layer in each stage: embeddings are adapted in the first one, the head in the last."""
    root, model = folder_of(architecture, adapter)
    arguments = engine_args(root / "base", root / "adapter", pipeline_parallel_size=2)
    with engine(**arguments, enforce_eager=False, compilation_config=TRACED) as llm:
        got = generate(vllm, llm, prompts, REQUESTS)
    assert_equal(model, prompts, got, REQUESTS)


@pytest.fixture(scope="module")
def server(vllm, folder_of, tmp_path_factory):
    """A server that was given an exported folder and no flag about steering: address, process."""
    root, _ = folder_of("llama")
    folder = tmp_path_factory.mktemp("served") / "model"
    export_folder(folder, str(root / "base"), root / "adapter", models.STEERING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
                "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
                "--enforce-eager", "--max-model-len", "128", "--gpu-memory-utilization", "0.1",
                "--served-model-name", "tiny",
            ],
            stdout=file, stderr=file, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        else:
            pytest.fail(f"the server never came up: {log.read_text()[-3000:]}")
        yield address, process
    finally:
        process.terminate()
        process.wait(60)


def test_server(server, folder_of):
    """The openai client: streamed, with a strength of its own, and a bad one."""
    openai = pytest.importorskip("openai")
    _, model = folder_of("llama")
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)
    prompt = [5, 17, 40, 9, 33]
    words = " ".join(f"w{token:03}" for token in prompt)

    def ask(**extra):
        body = {"ignore_eos": True, "skip_special_tokens": False}
        stream = client.completions.create(
            model="tiny", prompt=words, max_tokens=NEW, temperature=0, stream=True,
            extra_body=body | ({"vllm_xargs": extra} if extra else {}),
        )  # fmt: skip
        text = "".join(chunk.choices[0].text for chunk in stream)
        return [int(word) for word in text.replace("w", " ").split()]

    for extra in ({}, {"strength": 2.0}, {"model": "base"}):
        tokens = ask(**extra)
        assert len(tokens) == NEW
        assert_same_tokens(tokens, truth(model, prompt, tokens, extra), TIE)
    generation = models.STEERING.generation
    tokens = ask()
    unsteered = teacher_forced_two_pass(model, prompt, tokens, 0.0, generation.alpha)
    assert [token for token, _ in unsteered] != tokens
    with pytest.raises(openai.BadRequestError, match="strength must be a number"):
        client.completions.create(
            model="tiny", prompt=words, extra_body={"vllm_xargs": {"strength": "x"}}
        )


def test_a_worker_that_is_killed(server):
    """The request fails and the server ends, both by vLLM's own means; nobody waits."""
    openai, psutil = pytest.importorskip("openai"), pytest.importorskip("psutil")
    address, process = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    body = {"ignore_eos": True}
    stream = client.completions.create(
        model="tiny", prompt="w005 w017", max_tokens=120, stream=True, extra_body=body
    )
    next(stream)
    below = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in below if "VLLM::Worker" in " ".join(child.cmdline())]
    assert len(workers) == 1
    workers[0].kill()
    with pytest.raises(openai.APIError):
        for chunk in stream:
            assert chunk.choices[0].finish_reason is None
    process.wait(120)
    assert psutil.wait_procs(below, timeout=60)[1] == []
