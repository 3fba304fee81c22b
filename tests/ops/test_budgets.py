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


def broken(kernels: dict[str, dict[str, Any]], slack: float = 1.0) -> list[str]:
    """Say which budgets are not kept by which figures; `slack` stretches those of instructions."""
    found = []

    def compare(what: str, got: int, most: float) -> None:
        if got > most:
            found.append(f"{what} {got}, budget {most:g}")

    for form, kernel in kernels.items():
        cost, budget = spent(kernel), BUDGETS[form]
        compare(f"{form}: entry", cost.entry, slack * budget.entry)
        compare(f"{form}: reading", cost.reading, slack * budget.reading)
        if cost.wide_loads != budget.wide_loads or len(cost.loops) != len(budget.loops):
            found.append(f"{form}: {cost}, budget {budget}")
        for got, most in zip(cost.loops, budget.loops, strict=False):
            compare(f"{form}: instructions of a loop", got[0], slack * most[0])
            if slack == 1 or not most[1]:  # a walk without barriers stays one
                compare(f"{form}: barriers of a loop", got[1], most[1])
        if slack == 1:
            compare(f"{form}: barriers", cost.entry_barriers, budget.entry_barriers)
            compare(f"{form}: barriers on the way", cost.reading_barriers, budget.reading_barriers)
            most = budget.registers or cubins.REGISTERS[form.split()[0]]
            compare(f"{form}: registers", cost.registers, most)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not cubins.ALL, reason="counted in make test-oldest-triton")
def test_every_kernel_keeps_its_budget():
    pytest.importorskip("triton")
    kernels = {x["form"]: x for x in cubins.compiled(90) if budgeted(x["form"])}
    assert set(kernels) == set(BUDGETS)
    found = broken(kernels)
    assert not found, "\n".join(found)


def test_a_broken_budget_is_told_with_both_figures():
    loop = {"instructions": 272, "barriers": 1}
    shortest = {"instructions": 690, "barriers": 12, "wide_loads": 0}
    code = {"shortest": shortest, "reading": None, "loops": [loop]}
    form = "sample_rows bf16 GREEDY"
    budget = BUDGETS[form]
    assert broken({form: {"code": code, "registers": 81}}) == [
        f"{form}: entry 690, budget {budget.entry}",
        f"{form}: barriers of a loop 1, budget 0",
        f"{form}: barriers 12, budget {budget.entry_barriers}",
        f"{form}: registers 81, budget {budget.registers}",
    ]
    assert broken({form: {"code": code, "registers": 81}}, 1.35) == [
        f"{form}: barriers of a loop 1, budget 0"
    ]


def budgeted(form: str) -> bool:
    """Whether a form has a row in the table: those of large vocabularies and one dtype."""
    name, *words = form.split()
    if name in cubins.STEP:  # of SmolLM2-135M and Qwen2.5-1.5B
        small = {"TILE=256", "TILE=1024", "TILE=2048", "DIM=64", "DIM=128"} & set(words)
        return bool(small) and not {"fp32", "GELU", "NORM", "SOFTCAP", "RANK=64"} & set(words)
    return not name.startswith(("linear", "finish")) and "unaligned" not in words and (
        len({"fp32", "bf16", "fp16"} & set(words)) <= 1 and "fp16" not in words
    )  # fmt: skip
