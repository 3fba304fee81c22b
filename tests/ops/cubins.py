"""Everything that is launched, compiled for a device that need not be there.

A call goes Triton's own way up to the launch. The compiler cannot run in a process that has
TRITON_INTERPRET set, so this file is also a script, which prints a line of JSON for each kernel.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# 65536 registers: 4 programs of 4 warps at once, 2 of 8 warps; of the last two 1 or 2.
REGISTERS = {
    "measure_tiles": 128,
    "steer_tiles": 128,
    "choose_tiles": 128,
    "combine_rows": 64,
    "settle_rows": 64,
    "sample_rows": 168,
    "score_rows": 128,
    "project_rows": 128,
    "divergence_rows": 64,
    "support_rows": 168,
    "linear_tiles": 128,
    "finish_rows": 128,
    "finish_norm": 128,
    "finish_gate": 128,
    "finish_heads": 255,
    "attend_tiles": 255,
    "attend_rows": 168,
    "cut_rows": 168,
    "topk_rows": 168,
}
STEP = ("finish_norm", "finish_gate", "finish_heads", "attend_tiles", "attend_rows")
# Every form takes minutes per target; otherwise every kernel in the forms of one dtype.
ALL = os.environ.get("SVD_CUBINS") == "all"
WIDE_COPY = "cp.async.cg.shared.global"  # of 16 bytes always: how the linear reads


@functools.cache
def compiled(target: int) -> list[dict[str, Any]]:
    """What the compiler made of every form of every kernel for sm_<target>."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(target)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def launches(target: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, options) of all that `launch.warmup` compiles, and of the linear."""
    import torch

    from svd_engine.kernels import launch, launch_linear, launch_step

    asked = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append((self.kernel, arguments, options))

    modules = launch, launch_linear, launch_step
    for name in REGISTERS:
        module = next(x for x in modules if hasattr(x, name))
        setattr(module, name, Recorder(getattr(module, name)))
    launch.overlaps = lambda device: target >= 90
    if ALL:
        # All of a large vocabulary; float16 stands for the narrower workspace of a small one.
        launch.warmup(151936, (torch.bfloat16, torch.float32), "cpu")
        launch.warmup(49152, (torch.float16,), "cpu")
    else:
        launch.warmup(151936, (torch.float32 if target == 80 else torch.bfloat16,), "cpu")
    for dtype, out, fan_in in (
        (torch.bfloat16, 16384, 64),
        (torch.bfloat16, 4096, 64),
        (torch.bfloat16, 256, 1536),
        (torch.bfloat16, 256, 1535),
        (torch.float16, 256, 1536),
        (torch.float32, 16384, 64),
        (torch.float32, 256, 1535),
    )[:: 1 if ALL else 5]:
        for rows, rank in ((2, 0), (2, 8), (32, 0)):
            x, result = torch.empty(rows, fan_in, dtype=dtype), torch.empty(rows, out, dtype=dtype)
            launch_linear.linear(x, joined([out], fan_in, rank, dtype), 1, result)
    for dtype in (torch.bfloat16, torch.float32)[: 2 if ALL else 1]:
        steps(dtype)
    return asked


def joined(outs, fan_in, rank, dtype):
    """Joined linear layers of these sizes, with an adapter's term of this rank."""
    import torch

    from svd_engine.kernels.launch_linear import Joined

    weights = tuple(torch.empty(out, fan_in, dtype=dtype) for out in outs)
    return Joined(
        weights, torch.empty(2, sum(outs)), torch.empty(len(outs) * rank, fan_in, dtype=dtype),
        torch.empty(rank, sum(outs), dtype=dtype), None, rank == 0,
    )  # fmt: skip


def steps(dtype):
    """Launch what layers of some shapes and forms need."""
    import torch

    from svd_engine.kernels.launch_step import (
        Heads,
        Norm,
        Places,
        attend,
        attention_size,
        finish_with_gate,
        finish_with_heads,
        finish_with_norm,
        product,
        workspace_size,
    )

    for width, inner, heads, kv_heads, dim, rank, normed in (
        (576, 1536, 9, 3, 64, 8, False),  # SmolLM2-135M
        (1536, 8960, 12, 2, 128, 0, False),  # Qwen2.5-1.5B
        (3584, 18944, 28, 4, 128, 64, True),
        (2304, 9216, 8, 4, 256, 8, True),  # Gemma 2
    )[:: 1 if ALL else 3]:
        norm = Norm(torch.empty(width, dtype=dtype), 1e-6, 0.0)
        of_head = Norm(torch.empty(dim, dtype=dtype), 1e-6, 0.0) if normed else None
        form = Heads(heads, kv_heads, dim, 0.1, 0, 50.0 if normed else 0.0, of_head, of_head)
        qkv = joined([heads * dim, kv_heads * dim, kv_heads * dim], width, rank, dtype)
        output, down = (
            joined([width], heads * dim, rank, dtype),
            joined([width], inner, rank, dtype),
        )
        gate_up = joined([inner, inner], width, rank, dtype)
        size = max(workspace_size(2, [qkv, output, gate_up, down]), attention_size(2, form))
        workspace = torch.empty(size)
        places = Places(torch.zeros(2, dtype=torch.int64), 1, torch.ones(1, dtype=torch.int64), 1)
        x, fed = torch.empty(2, width, dtype=dtype), torch.empty(2, inner, dtype=dtype)
        query = torch.empty(2, heads, dim, dtype=dtype)
        cache = torch.empty(2, kv_heads, 1, dim, dtype=dtype)
        tables = torch.empty(1, dim, dtype=dtype), torch.empty(1, dim, dtype=dtype)
        finish_with_norm(None, None, x, 1.0, norm, 0, x, x)
        finish_with_heads(product(x, qkv, workspace), form, places, tables, query, cache, cache)
        attend(query, cache, cache, form, places, None, workspace, query)
        after = norm if normed else None
        for y, z in ((query.flatten(1), output), (fed, down)):
            finish_with_norm(product(y, z, workspace), after, x, 1.0, norm, 1, x, x)
        finish_with_gate(product(x, gate_up, workspace), normed, None, 1, fed)


def form(name: str, signature: dict[str, str], options: dict[str, Any]) -> str:
    """`name dtypes flags`, by which `test_budgets` knows it: "steer_tiles bf16 REMOVE"."""
    rows = {"steer_tiles": ("adapted", "base", "out")}.get(name, ("adapted", "base"))
    sizes: tuple[str, ...] = ()
    if name in STEP:
        rows = ("weight0", "query", "up")
        sizes = tuple(
            f"{x}={options[x]}" for x in ("TILE", "DIM", "SPLITS", "RANK") if x in options
        )
    dtypes = (signature.get(x, "")[1:] for x in rows)
    layout = () if options.get("ALIGNED", True) else ("unaligned",)
    plain = ("ALIGNED", "PDL")
    flags = (x for x, value in options.items() if value is True and x not in plain and x.isupper())
    return " ".join((name, *dict.fromkeys(x for x in dtypes if x), *layout, *sizes, *sorted(flags)))


def main(target: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from svd_engine.kernels import launch_linear

    from .sass import Code

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"svd-engine-{os.getpid()}.cubin"
    launch_linear.can_overlap = lambda device: target >= 90
    asked = launches(target)

    class Device:
        """Stands for the driver: what Triton asks of it before it launches."""

        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", target, 32))

    driver.set_active(Device())
    seen = set()
    for kernel, arguments, options in asked:
        compiled = kernel.run(*arguments, grid=(1,), warmup=True, **options)
        if compiled in seen:
            continue
        seen.add(compiled)
        signature = compiled.src.signature
        copies = kernel.__name__ in ("linear_tiles", "attend_tiles")
        wide = WIDE_COPY if copies else "ld.global.v4.b32"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [cuobjdump, "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        print(
            json.dumps(
                {
                    "name": kernel.__name__,
                    "registers": int(registers),
                    "stack": int(stack),
                    "local": int(local),
                    "overlaps": options.get("launch_pdl", False),
                    "aligned": options.get("ALIGNED", False),
                    "reads": not options.get("CHOSEN", False),
                    "shared": compiled.metadata.shared,
                    "vectors": wide in compiled.asm["ptx"],
                    "specialised": [
                        x.name
                        for x in kernel.params
                        if not x.is_constexpr and not x.do_not_specialize
                    ],
                    "signature": " ".join(signature.values()),
                    "form": form(kernel.__name__, signature, options),
                    "code": Code.of(cubin, cuobjdump).summary() if target == 90 else {},
                }
            )
        )
    cubin.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]))
