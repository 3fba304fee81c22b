"""What takes processes of its own: two ranks of a layer, and the server with a real client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from svd_engine.integrations.vllm.export import export_folder
from tests.tiny import assert_same_tokens, teacher_forced_two_pass
from tests.vllm import models
from tests.vllm.test_engine import LENGTHS, REQUESTS, TIE, truth

NEW = 16
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip
TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams
from svd_engine.integrations.vllm import engine_args

folder, prompts, requests, new = json.load(sys.stdin)
if __name__ == "__main__":
    llm = LLM(**engine_args(
        folder + "/base", folder + "/adapter", dtype="float32", enforce_eager=True,
        max_model_len=128, max_num_batched_tokens=64, gpu_memory_utilization=0.1,
        tensor_parallel_size=2,
    ))
    params = [
        SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
                       extra_args=extra or None)
        for extra in requests
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [("llama", "head"), ("qwen3", None), ("gemma2", None)],
)
def test_tensor_parallel(vllm, folder_of, architecture, adapter):
    """Two processes: LoRA with a head, DoRA, and IA3, each cut as the weights are."""
    root, model = folder_of(architecture, adapter)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, models.VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    run = subprocess.run(
        [sys.executable, "-c", TWO_RANKS],
        input=json.dumps([str(root), prompts, REQUESTS, NEW]), text=True, capture_output=True,
        env=os.environ | ENVIRONMENT, timeout=900,
    )  # fmt: skip
    found = [line for line in run.stdout.splitlines() if line.startswith("TOKENS")]
    assert found, run.stderr[-3000:]
    got = json.loads(found[0].removeprefix("TOKENS"))
    for prompt, tokens, extra in zip(prompts, got, REQUESTS, strict=True):
        assert len(tokens) == NEW
        assert_same_tokens(tokens, truth(model, prompt, tokens, extra), TIE)


@pytest.fixture(scope="module")
def server(vllm, folder_of, tmp_path_factory):
    """The address of a server that was given an exported folder and no flag about steering."""
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
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_server(server, folder_of):
    """The openai client: streamed, with a strength of its own, and a bad one."""
    openai = pytest.importorskip("openai")
    _, model = folder_of("llama")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    prompt = [5, 17, 40, 9, 33]
    words = " ".join(f"w{token:03}" for token in prompt)

    def ask(**extra):
        stream = client.completions.create(
            model="tiny", prompt=words, max_tokens=NEW, temperature=0, stream=True,
            extra_body={"ignore_eos": True} | ({"vllm_xargs": extra} if extra else {}),
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
        ask(strength="x")
