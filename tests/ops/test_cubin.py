"""Everything that is launched compiles for every target, without spills and within its registers.

No GPU is needed: a call goes Triton's own way up to the launch. The compiler cannot run in a
process that has TRITON_INTERPRET set, so the work is done by this file run as a script, a process
for each target.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = (80, 90, 100)
# 65536 registers: 4 programs of 4 warps at once, 2 of 8 warps; of the last two 1 or 2.
REGISTERS = {
    "measure_tiles": 128,
    "steer_tiles": 128,
    "choose_tiles": 128,
    "settle_rows": 64,
    "sample_rows": 128,
    "score_rows": 128,
    "project_rows": 128,
    "divergence_rows": 64,
    "linear_tiles": 128,
    "linear_rows": 128,
    "cut_rows": 168,
    "topk_rows": 168,
}
WIDE_COPY = "cp.async.cg.shared.global"  # of 16 bytes always: how the linear reads


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", __file__, str(target)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kernels = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert {x["name"] for x in kernels} == set(REGISTERS)
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= REGISTERS[kernel["name"]], kernel
        assert kernel["specialised"] == [], "a request could compile this anew"
        if kernel["aligned"] and kernel["reads"]:
            assert kernel["vectors"], f"no 16-byte loads: {kernel}"
        # 164 KiB or more are there for the programs of a multiprocessor: two at once at least.
        assert kernel["shared"] <= 65536, kernel


def launches():
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


def main(target: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"svd-engine-{os.getpid()}.cubin"
    asked = launches()

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
                    "signature": " ".join(compiled.src.signature.values()),
                    "constants": [str(x) for x in compiled.src.constants.values()],
                }
            )
        )
    cubin.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]))
