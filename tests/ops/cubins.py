"""Everything that is launched, compiled for a device that need not be there.

The compiler cannot run in a process that has TRITON_INTERPRET set, so this file is also a script,
which prints a line of JSON for each kernel that it compiles.
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
    "sample_rows": 128,
    "score_rows": 128,
    "project_rows": 128,
    "divergence_rows": 64,
    "support_rows": 168,
    "linear_tiles": 128,
    "linear_rows": 128,
    "cut_rows": 168,
    "topk_rows": 168,
}
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

    from svd_engine.kernels import launch, launch_linear

    asked = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append((self.kernel, arguments, options))

    for name in REGISTERS:
        module = launch_linear if name.startswith("linear") else launch
        setattr(module, name, Recorder(getattr(module, name)))
    launch.overlaps = lambda device: target >= 90
    # All of a large vocabulary; float16 stands for the narrower workspace of a small one.
    launch.warmup(151936, (torch.bfloat16, torch.float32), "cpu")
    launch.warmup(49152, (torch.float16,), "cpu")
    for dtype, low_dtype, out, fan_in in (
        (torch.bfloat16, torch.bfloat16, 16384, 64),
        (torch.bfloat16, torch.float32, 16384, 64),
        (torch.bfloat16, torch.float32, 4096, 64),
        (torch.bfloat16, torch.float32, 256, 1536),
        (torch.bfloat16, torch.float32, 256, 1535),
        (torch.float16, torch.float16, 256, 1536),
        (torch.float32, torch.float32, 16384, 64),
        (torch.float32, torch.float32, 256, 1535),
    ):
        x, weight = torch.empty(2, fan_in, dtype=dtype), torch.empty(out, fan_in, dtype=dtype)
        down, up = (torch.empty(*n, dtype=low_dtype) for n in ((8, fan_in), (out, 8)))
        result = torch.empty(2, out, dtype=dtype)
        launch_linear.linear(x, weight, None, None, None, None, 0, result)
        launch_linear.linear(x, weight, None, down, up, None, 1, result)
    return asked


def form(name: str, signature: dict[str, str], options: dict[str, Any]) -> str:
    """`name dtypes flags`, by which `test_budgets` knows it: "steer_tiles bf16 REMOVE"."""
    rows = ("adapted", "base", "out") if name == "steer_tiles" else ("adapted", "base")
    dtypes = (signature.get(x, "")[1:] for x in rows)
    layout = () if options.get("ALIGNED", True) else ("unaligned",)
    plain = ("ALIGNED", "PDL")
    flags = (x for x, value in options.items() if value is True and x not in plain and x.isupper())
    return " ".join((name, *dict.fromkeys(x for x in dtypes if x), *layout, *sorted(flags)))


def main(target: int) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .sass import Code

    types = {
        torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
        torch.int64: "*i64", torch.bool: "*i1",
    }  # fmt: skip
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"svd-engine-{os.getpid()}.cubin"
    seen = set()
    for kernel, arguments, options in launches(target):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = values.pop(parameter.name)
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(parameter.num,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = types[value.dtype]
            else:
                signature[parameter.name] = parameter.annotation_type
        key = (kernel.__name__, *signature.items(), *constants.items())
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants),
            target=GPUTarget("cuda", target, 32),
            options=values,
        )
        wide = WIDE_COPY if kernel.__name__ == "linear_tiles" else "ld.global.v4.b32"
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
