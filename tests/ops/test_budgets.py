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
    "attend_rows DIM=128 OVERLAP": Budget(660, 0),
    "attend_rows DIM=64 OVERLAP": Budget(470, 3),
    "attend_tiles bf16 DIM=128 OVERLAP": Budget(660, 12, loops=((225, 9),)),
    "attend_tiles bf16 DIM=64 OVERLAP": Budget(690, 12, loops=((235, 9),)),
    "choose_tiles bf16 GREEDY REMOVE": Budget(102, 0, 830, 5, 4),
    "choose_tiles bf16 GREEDY": Budget(101, 0, 830, 5, 4),
    "choose_tiles bf16 REMOVE": Budget(119, 0, 3080, 5, 4),
    "choose_tiles bf16": Budget(118, 0, 3050, 5, 4),
    "choose_tiles fp32 GREEDY REMOVE": Budget(110, 0, 896, 5, 8),
    "choose_tiles fp32 GREEDY": Budget(109, 0, 896, 5, 8),
    "choose_tiles fp32 REMOVE": Budget(143, 0, 3326, 5, 8),
    "choose_tiles fp32": Budget(142, 0, 3294, 5, 8),
    "combine_rows": Budget(167, 0),
    "cut_rows bf16 REMOVE": Budget(882, 10, loops=((396, 3), (312, 0), (1372, 0), (1503, 5))),
    "cut_rows bf16": Budget(877, 10, loops=((399, 3), (327, 0), (1383, 0), (1514, 5))),
    "cut_rows fp32 REMOVE": Budget(952, 10, loops=((427, 3), (336, 0), (1481, 0), (1623, 5))),
    "cut_rows fp32": Budget(947, 10, loops=((430, 3), (353, 0), (1493, 0), (1635, 5))),
    "divergence_rows": Budget(343, 0),
    "finish_gate bf16 TILE=256 SPLITS=1 RANK=0 OVERLAP": Budget(155, 0),
    "finish_gate bf16 TILE=256 SPLITS=1 RANK=8 OVERLAP": Budget(400, 0),
    "finish_heads bf16 DIM=128 SPLITS=2 RANK=0 OVERLAP": Budget(315, 0),
    "finish_heads bf16 DIM=64 SPLITS=1 RANK=8 OVERLAP": Budget(470, 0),
    "finish_norm bf16 TILE=1024 SPLITS=0 RANK=0 BEFORE OVERLAP": Budget(180, 2, 180, 2, 2),
    "finish_norm bf16 TILE=1024 SPLITS=1 RANK=8 BEFORE OVERLAP": Budget(530, 2, 530, 2, 14),
    "finish_norm bf16 TILE=1024 SPLITS=3 RANK=8 BEFORE OVERLAP": Budget(620, 2, 620, 2, 18),
    "finish_norm bf16 TILE=2048 SPLITS=0 RANK=0 BEFORE OVERLAP": Budget(180, 2, 180, 2, 2),
    "finish_norm bf16 TILE=2048 SPLITS=2 RANK=0 BEFORE OVERLAP": Budget(300, 2, 300, 2, 8),
    "measure_tiles bf16 BASE": Budget(521, 5, 521, 5, 4),
    "measure_tiles bf16 MARKED": Budget(352, 5, 352, 5, 4),
    "measure_tiles bf16": Budget(339, 5, 339, 5, 4),
    "measure_tiles fp32 BASE": Budget(502, 5, 502, 5, 8),
    "measure_tiles fp32 MARKED": Budget(320, 5, 320, 5, 8),
    "measure_tiles fp32": Budget(311, 5, 311, 5, 8),
    "project_rows bf16": Budget(739, 2, loops=((333, 0),)),
    "project_rows fp32": Budget(798, 2, loops=((359, 0),)),
    "sample_rows bf16 GREEDY": Budget(735, 7, loops=((278, 0),)),
    "sample_rows bf16": Budget(775, 7, loops=((1378, 0),)),
    "sample_rows fp32 GREEDY": Budget(735, 7, loops=((278, 0),)),
    "sample_rows fp32": Budget(775, 7, loops=((1378, 0),)),
    "score_rows bf16 CHOSEN REMOVE": Budget(368, 0),
    "score_rows bf16 CHOSEN": Budget(368, 0),
    "score_rows bf16 REMOVE": Budget(656, 7, loops=((246, 0),)),
    "score_rows bf16": Budget(588, 2, loops=((255, 0),)),
    "score_rows fp32 CHOSEN REMOVE": Budget(397, 0),
    "score_rows fp32 CHOSEN": Budget(397, 0),
    "score_rows fp32 REMOVE": Budget(656, 7, loops=((250, 0),)),
    "score_rows fp32": Budget(635, 2, loops=((275, 0),)),
    "settle_rows": Budget(366, 0),
    "steer_tiles bf16 REMOVE": Budget(116, 0, 460, 0, 4),
    "steer_tiles bf16": Budget(115, 0, 468, 0, 4),
    "steer_tiles fp32 DELTA REMOVE": Budget(127, 0, 384, 0, 8),
    "steer_tiles fp32 REMOVE": Budget(128, 0, 433, 0, 8),
    "steer_tiles fp32": Budget(127, 0, 434, 0, 8),
    "support_rows bf16": Budget(513, 0, loops=((955, 17),)),
    "support_rows fp32": Budget(554, 0, loops=((1031, 21),)),
    "topk_rows bf16 REMOVE": Budget(1502, 18, loops=((284, 0), (366, 3), (870, 13))),
    "topk_rows bf16": Budget(1514, 18, loops=((284, 0), (366, 3), (880, 13))),
    "topk_rows fp32 REMOVE": Budget(1622, 18, loops=((306, 0), (395, 3), (939, 13))),
    "topk_rows fp32": Budget(1635, 18, loops=((306, 0), (395, 3), (950, 13))),
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
@pytest.mark.skipif(not cubins.ALL, reason="counted in make test-oldest-triton")
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
