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
# 65536 registers: 5, 4 and 2 programs of 4, 4 and 8 warps at once.
REGISTERS = {"measure_tiles": 96, "steer_tiles": 128, "sample_rows": 128}
VOCABULARIES = (49152, 50257, 151936)


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
        if kernel["aligned"]:
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
    each, whole = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for vocab in VOCABULARIES:
        for dtype in (torch.bfloat16, torch.float32):
            rows = torch.empty(1, vocab, dtype=dtype)
            for penalty, mu, key in ((-math.inf, each, whole), (-1.0, 1.0, 7)):
                launch.steer(rows, rows, mu, 0.1, penalty, rows)
                for temperature in (0.0, 1.0):
                    launch.sample(
                        rows, rows, mu, 0.1, penalty, temperature, key, key, whole, each
                    )  # fmt: skip
    return asked


def main(target: int) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
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
                    "aligned": options["ALIGNED"],
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
