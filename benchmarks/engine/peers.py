"""What a step is held against: reading its weights, and llama.cpp where it is installed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from svd_engine import loading

# A process of its own, because its threads and PyTorch's would wait for each other's cores.
LLAMA = """
import ctypes, json, os, sys, time
import llama_cpp

source, target, kind, threads = sys.argv[1], *sys.argv[2:4], int(sys.argv[4])
if not os.path.exists(target):
    options = llama_cpp.llama_model_quantize_default_params()
    types = {
        "float32": llama_cpp.LLAMA_FTYPE_ALL_F32, "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }
    options.ftype, options.allow_requantize = types[kind], True
    llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
model = llama_cpp.Llama(
    target, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
)
print("ready", flush=True)
for line in sys.stdin:
    prompt, new = json.loads(line)
    model.reset()
    model.eval(prompt)
    start = time.perf_counter()
    for _ in range(new):
        model.eval([model.sample(temp=0)])
    print((time.perf_counter() - start) / new, flush=True)
"""


class LlamaCpp:
    """SmolLM2-135M in llama.cpp, un-steered: the same weights, of one kind."""

    def __init__(self, dtype: str, folder: Path) -> None:
        source, target = str(loading.smollm2_file()), str(folder / f"{dtype}.gguf")
        command = [sys.executable, "-c", LLAMA, source, target, dtype]
        self._process = subprocess.Popen(
            [*command, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdout is None or self._process.stdout.readline() != "ready\n":
            raise RuntimeError("llama.cpp did not start")

    def seconds_per_token(self, prompt: list[int], new: int) -> float:
        """Decode greedily; the prompt is not counted."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([prompt, new]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def llama_cpp_is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def weights_of(model: nn.Module) -> list[Tensor]:
    """List the matrices that a step reads, each once, as float32 words."""
    matrices = {p.data_ptr(): p.detach() for p in model.parameters() if p.dim() == 2}
    return [matrix.view(torch.float32) for matrix in matrices.values()]


def read(weights: list[Tensor]) -> None:
    """Read every word once, in order."""
    for matrix in weights:
        torch.sum(matrix)
