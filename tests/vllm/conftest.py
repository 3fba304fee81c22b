"""Engines in this process, on tiny models; everything that runs vLLM is skipped without it."""

import gc
import os
from contextlib import contextmanager

import pytest
import torch

from tests.vllm import models

# One process, and a small cache.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

SETTINGS = dict(
    dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8,
    max_num_batched_tokens=64, gpu_memory_utilization=0.1, disable_log_stats=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def vllm():
    """The package, with the plugin registered as its entry point would."""
    vllm = pytest.importorskip("vllm")
    pytest.importorskip("vllm.exceptions")
    from vllm.model_executor.models import registry

    from svd_engine.integrations.vllm import plugin

    registry._run_in_subprocess = lambda function: function()  # saves an import of vLLM a class
    plugin.register()
    return vllm


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, words):
    """Return the folder of an architecture's base and adapter, and its PEFT model."""
    made = {}

    def get(architecture: str, adapter: str | None = None):
        key = architecture, adapter
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            model = models.build(architecture, adapter)
            models.save(model, root)
            words.save_pretrained(root / "base")
            made[key] = root, model
        return made[key]

    return get


@pytest.fixture(scope="session")
def prompts():
    """Token ids; one prompt is longer than a batch of prefill may be."""
    generator = torch.Generator().manual_seed(0)
    lengths = 5, 1, 9, 40, 70, 3
    return [torch.randint(3, models.VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def engine(vllm):
    """A context with an `LLM` of these arguments."""
    from vllm.distributed import cleanup_dist_env_and_memory

    @contextmanager
    def context(**arguments):
        llm = vllm.LLM(**SETTINGS | arguments)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()

    return context
