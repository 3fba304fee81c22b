"""Everything that is launched compiles for every target, without spills and within its registers.

No GPU is needed. The compiler cannot run in a process that has TRITON_INTERPRET set, so the work is
done by this file run as a script.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = (80, 90, 100)
# 65536 registers: 5 and 4 programs of 4 warps at once, 2 of 8 warps; of `cut_rows` 1 or 2.
REGISTERS = {
    "measure_tiles": 96,
    "steer_tiles": 128,
    "choose_tiles": 128,
    "settle_rows": 64,
    "sample_rows": 128,
    "cut_rows": 168,
    "topk_rows": 128,
    "score_rows": 128,
    "project_rows": 128,
    "divergence_rows": 64,
}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", __file__, str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {x["name"] for x in kernels} == set(REGISTERS)
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= REGISTERS[kernel["name"]], kernel
        assert kernel["specialised"] == [], "a request could compile this anew"
        if kernel["aligned"] and kernel["reads"]:
            assert kernel["vectors"], f"no 16-byte loads: {kernel}"


def launches():
    """(kernel, arguments, options) of what `launch` asks for over the flags and dtypes in use."""
    import torch

    from svd_engine.kernels import launch

    asked = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append((self.kernel, arguments, options))

    for name in REGISTERS:
        setattr(launch, name, Recorder(getattr(launch, name)))
    # The dtypes alternate with the alignment, which halves the compiling.
    for vocab, dtype, quick in (
        (151936, torch.bfloat16, False),
        (50257, torch.float32, False),
        (49152, torch.float32, True),
    ):
        rows = torch.empty(1, vocab, dtype=dtype)
        if quick:
            launch.steer(rows, rows, 1.0, 0.1, -math.inf, rows)
        else:
            record_all(launch, rows, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return asked


def record_all(launch, rows, each, whole):
    launch.steering_vector(rows, rows, rows)
    launch.divergence(rows, rows, each)
    launch.project_strength(rows, rows, whole, 0.1, each, each, each, each > 0)
    for penalty in (-math.inf, -1.0):
        launch.steer(rows, rows, 1.0, 0.1, penalty, rows)
        launch.topk(rows, rows, 1.0, 1, 0.1, penalty, each, whole)
        launch.sample_cut(rows, rows, 1.0, 0.1, penalty, 1.0, 1, 0.9, 0.1, 0, 0, whole, each)
        for alpha in (0.0, 0.1):
            launch.score(rows, rows, whole, 1.0, alpha, penalty, each)
            for temperature in (0.0, 1.0):
                launch.sample(rows, rows, 1.0, alpha, penalty, temperature, 0, 0, whole, each)


def main(target: int) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
    types[torch.bool] = "*i1"
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"svd-engine-{os.getpid()}.cubin"
    seen = set()
    for kernel, arguments, options in launches():
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
                    "vectors": "ld.global.v4.b32" in compiled.asm["ptx"],
                    "specialised": [
                        x.name
                        for x in kernel.params
                        if not x.is_constexpr and not x.do_not_specialize
                    ],
                    "signature": " ".join(signature.values()),
                    "constants": [str(x) for x in constants.values()],
                }
            )
        )
    cubin.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]))
