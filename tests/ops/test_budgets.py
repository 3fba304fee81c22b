"""The machine code of the kernels keeps its budgets."""

from typing import Any

import pytest

from . import cubins
from .budgets import BUDGETS, Budget


def spent(kernel: dict[str, Any]) -> Budget:
    """The figures of a kernel, as a budget that it just keeps."""
    code, registers = kernel["code"], kernel["registers"]
    entry, reading = code["shortest"], code["reading"]
    loops = tuple((x["instructions"], x["barriers"]) for x in code["loops"])
    if reading is None or loops:
        return Budget(entry["instructions"], entry["barriers"], loops=loops, registers=registers)
    return Budget(
        entry["instructions"], entry["barriers"],
        reading["instructions"], reading["barriers"], reading["wide_loads"],
        registers=registers,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not cubins.ALL, reason="counted in make test-oldest-triton")
def test_every_kernel_keeps_its_budget():
    pytest.importorskip("triton")
    kernels = {x["form"]: x for x in cubins.compiled(90) if budgeted(x["form"])}
    assert set(kernels) == set(BUDGETS)
    broken = []
    for form, budget in BUDGETS.items():
        cost = spent(kernels[form])
        pairs = [(x, getattr(cost, x), getattr(budget, x)) for x in Budget._fields]
        within = len(cost.loops) == len(budget.loops) and all(
            a <= b for got, most in zip(cost.loops, budget.loops, strict=True)
            for a, b in zip(got, most, strict=True)
        )  # fmt: skip
        for name, got, most in pairs:
            fine = {"loops": within, "wide_loads": got == most}.get(name)
            if name == "registers":
                fine = got <= (most or cubins.REGISTERS[form.split()[0]])
            if not (got <= most if fine is None else fine):
                broken.append(f"{form}: {name} {got}, budget {most}")
    assert not broken, "\n".join(broken)


def budgeted(form: str) -> bool:
    """Whether a form has a row in the table: those of large vocabularies and one dtype."""
    name, *words = form.split()
    if name in cubins.STEP:  # of SmolLM2-135M and Qwen2.5-1.5B
        small = {"TILE=256", "TILE=1024", "TILE=2048", "DIM=64", "DIM=128"} & set(words)
        return bool(small) and not {"fp32", "GELU", "NORM", "SOFTCAP", "RANK=64"} & set(words)
    return not name.startswith(("linear", "finish")) and "unaligned" not in words and (
        len({"fp32", "bf16", "fp16"} & set(words)) <= 1 and "fp16" not in words
    )  # fmt: skip
