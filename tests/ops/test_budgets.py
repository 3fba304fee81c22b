"""What the machine code of the kernels may cost on sm_90, counted in what the compiler emits.

A thread of a program that streams a tile has 16 pairs of logits, one of a program that walks a row
8 of every tile. So `measure_tiles` within 352 instructions means at most 22 a pair.
"""

from typing import Any, NamedTuple

import pytest

from . import cubins


class Budget(NamedTuple):
    """At most so many; of wide loads, exactly so many on the way that reads logits."""

    entry: int  # instructions of the shortest way through the kernel
    entry_barriers: int
    reading: int = 0  # instructions of the shortest way that reads a tile outside of a loop
    reading_barriers: int = 0
    wide_loads: int = 0
    loops: tuple[tuple[int, int], ...] = ()  # instructions and barriers of each that reads tiles


BUDGETS: dict[str, Budget] = {
    "attend_rows DIM=128 OVERLAP": Budget(500, 0),
    "attend_rows DIM=64 OVERLAP": Budget(470, 3),
    "attend_tiles bf16 DIM=128 OVERLAP": Budget(660, 9, loops=((225, 7),)),
    "attend_tiles bf16 DIM=64 OVERLAP": Budget(630, 9, loops=((235, 7),)),
    "choose_tiles bf16": Budget(268, 14, 3382, 26, 4),
    "choose_tiles bf16 GREEDY": Budget(247, 14, 1086, 26, 4),
    "choose_tiles bf16 GREEDY REMOVE": Budget(246, 14, 1148, 26, 4),
    "choose_tiles bf16 REMOVE": Budget(269, 14, 3393, 26, 4),
    "choose_tiles fp32": Budget(295, 14, 3425, 26, 8),
    "choose_tiles fp32 GREEDY": Budget(245, 14, 1103, 26, 8),
    "choose_tiles fp32 GREEDY REMOVE": Budget(246, 14, 1105, 26, 8),
    "choose_tiles fp32 REMOVE": Budget(297, 14, 3405, 26, 8),
    "cut_rows bf16": Budget(340, 20, loops=((544, 15), (489, 15), (1747, 17))),
    "cut_rows bf16 REMOVE": Budget(339, 20, loops=((549, 15), (495, 15), (1739, 17))),
    "cut_rows fp32": Budget(343, 20, loops=((531, 15), (480, 15), (1783, 17))),
    "cut_rows fp32 REMOVE": Budget(342, 20, loops=((543, 15), (493, 15), (1784, 17))),
    "divergence_rows": Budget(350, 0),
    "finish_gate bf16 TILE=256 SPLITS=1 RANK=0 OVERLAP": Budget(155, 0),
    "finish_gate bf16 TILE=256 SPLITS=1 RANK=8 OVERLAP": Budget(400, 0),
    "finish_heads bf16 DIM=128 SPLITS=2 RANK=0 OVERLAP": Budget(315, 0),
    "finish_heads bf16 DIM=64 SPLITS=1 RANK=8 OVERLAP": Budget(470, 0),
    "finish_norm bf16 TILE=1024 SPLITS=0 RANK=0 BEFORE OVERLAP": Budget(180, 1, 180, 1, 2),
    "finish_norm bf16 TILE=1024 SPLITS=1 RANK=8 BEFORE OVERLAP": Budget(530, 1, 530, 1, 14),
    "finish_norm bf16 TILE=1024 SPLITS=3 RANK=8 BEFORE OVERLAP": Budget(620, 1, 620, 1, 18),
    "finish_norm bf16 TILE=2048 SPLITS=0 RANK=0 BEFORE OVERLAP": Budget(180, 1, 180, 1, 2),
    "finish_norm bf16 TILE=2048 SPLITS=2 RANK=0 BEFORE OVERLAP": Budget(300, 1, 300, 1, 8),
    "measure_tiles bf16": Budget(610, 11, 610, 11, 4),
    "measure_tiles bf16 BASE": Budget(829, 20, 829, 20, 4),
    "measure_tiles fp32": Budget(536, 11, 536, 11, 8),
    "measure_tiles fp32 BASE": Budget(827, 20, 827, 20, 8),
    "project_rows bf16": Budget(323, 17, loops=((423, 15),)),
    "project_rows fp32": Budget(319, 17, loops=((405, 15),)),
    "sample_rows bf16": Budget(244, 14, loops=((1624, 15),)),
    "sample_rows bf16 GREEDY": Budget(232, 14, loops=((535, 15),)),
    "sample_rows fp32": Budget(243, 14, loops=((1615, 15),)),
    "sample_rows fp32 GREEDY": Budget(232, 14, loops=((528, 15),)),
    "score_rows bf16": Budget(357, 20, loops=((369, 9),)),
    "score_rows bf16 CHOSEN": Budget(335, 17),
    "score_rows bf16 CHOSEN REMOVE": Budget(334, 17),
    "score_rows bf16 REMOVE": Budget(302, 14, loops=((374, 9),)),
    "score_rows fp32": Budget(353, 20, loops=((352, 9),)),
    "score_rows fp32 CHOSEN": Budget(331, 17),
    "score_rows fp32 CHOSEN REMOVE": Budget(330, 17),
    "score_rows fp32 REMOVE": Budget(298, 14, loops=((360, 9),)),
    "settle_rows": Budget(375, 0),
    "steer_tiles bf16": Budget(240, 14, 686, 14, 4),
    "steer_tiles bf16 REMOVE": Budget(243, 14, 730, 14, 4),
    "steer_tiles fp32": Budget(253, 14, 680, 14, 8),
    "steer_tiles fp32 DELTA REMOVE": Budget(254, 14, 624, 14, 8),
    "steer_tiles fp32 REMOVE": Budget(254, 14, 674, 14, 8),
    "topk_rows bf16": Budget(1274, 27, loops=((641, 15), (914, 13))),
    "topk_rows bf16 REMOVE": Budget(1279, 27, loops=((649, 15), (923, 13))),
    "topk_rows fp32": Budget(1303, 27, loops=((631, 15), (966, 13))),
    "topk_rows fp32 REMOVE": Budget(1311, 27, loops=((641, 15), (965, 13))),
}  # fmt: skip


def spent(code: dict[str, Any]) -> Budget:
    """The figures of a kernel, as a budget that it just keeps."""
    entry, reading = code["shortest"], code["reading"]
    loops = tuple((x["instructions"], x["barriers"]) for x in code["loops"])
    if reading is None or loops:
        return Budget(entry["instructions"], entry["barriers"], loops=loops)
    return Budget(
        entry["instructions"], entry["barriers"],
        reading["instructions"], reading["barriers"], reading["wide_loads"],
    )  # fmt: skip


@pytest.mark.slow
def test_every_kernel_keeps_its_budget():
    pytest.importorskip("triton")
    kernels = {x["form"]: x for x in cubins.compiled(90) if budgeted(x["form"])}
    assert set(kernels) == set(BUDGETS)
    broken = []
    for form, budget in BUDGETS.items():
        cost = spent(kernels[form]["code"])
        pairs = [(x, getattr(cost, x), getattr(budget, x)) for x in Budget._fields]
        within = len(cost.loops) == len(budget.loops) and all(
            a <= b for got, most in zip(cost.loops, budget.loops, strict=True)
            for a, b in zip(got, most, strict=True)
        )  # fmt: skip
        for name, got, most in pairs:
            fine = {"loops": within, "wide_loads": got == most}.get(name)
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
