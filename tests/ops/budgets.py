"""What the machine code of the kernels may cost on sm_90, counted in what the compiler emits.

A thread of a program that streams a tile has 16 pairs of logits, one of a program that walks a row
8 of every tile. So `measure_tiles` within 352 instructions means at most 22 a pair.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """At most so many; of wide loads, exactly so many on the way that reads logits."""

    entry: int  # instructions of the shortest way through the kernel
    entry_barriers: int
    reading: int = 0  # instructions of the shortest way that reads a tile outside of a loop
    reading_barriers: int = 0
    wide_loads: int = 0
    loops: tuple[tuple[int, int], ...] = ()  # instructions and barriers of each that reads tiles
    registers: int = 0  # per thread, where they let several rows run at once on a multiprocessor


BUDGETS: dict[str, Budget] = {
    "attend_rows DIM=128 OVERLAP": Budget(660, 0),
    "attend_rows DIM=64 OVERLAP": Budget(470, 3),
    "attend_tiles bf16 DIM=128 OVERLAP": Budget(660, 12, loops=((225, 9),)),
    "attend_tiles bf16 DIM=64 OVERLAP": Budget(690, 12, loops=((235, 9),)),
    "choose_tiles bf16 GREEDY REMOVE": Budget(74, 0, 702, 6, 4),
    "choose_tiles bf16 GREEDY": Budget(73, 0, 703, 6, 4),
    "choose_tiles bf16 REMOVE": Budget(90, 0, 2380, 6, 4),
    "choose_tiles bf16": Budget(89, 0, 2386, 6, 4),
    "choose_tiles fp32 GREEDY REMOVE": Budget(74, 0, 705, 6, 8),
    "choose_tiles fp32 GREEDY": Budget(73, 0, 705, 6, 8),
    "choose_tiles fp32 REMOVE": Budget(113, 0, 2386, 6, 8),
    "choose_tiles fp32": Budget(112, 0, 2403, 6, 8),
    "combine_rows": Budget(97, 0),
    "cut_rows bf16 REMOVE": Budget(1025, 15, loops=((390, 3), (318, 0), (1090, 0), (1220, 5))),
    "cut_rows bf16": Budget(868, 15, loops=((384, 3), (325, 0), (1092, 0), (1223, 5))),
    "cut_rows fp32 REMOVE": Budget(1060, 15, loops=((388, 3), (320, 0), (1094, 0), (1273, 5))),
    "cut_rows fp32": Budget(880, 15, loops=((368, 3), (308, 0), (1079, 0), (1256, 5))),
    "divergence_rows": Budget(210, 0),
    "finish_gate bf16 TILE=256 SPLITS=1 RANK=0 OVERLAP": Budget(155, 0),
    "finish_gate bf16 TILE=256 SPLITS=1 RANK=8 OVERLAP": Budget(400, 0),
    "finish_heads bf16 DIM=128 SPLITS=2 RANK=0 OVERLAP": Budget(315, 0),
    "finish_heads bf16 DIM=64 SPLITS=1 RANK=8 OVERLAP": Budget(470, 0),
    "finish_norm bf16 TILE=1024 SPLITS=0 RANK=0 BEFORE OVERLAP": Budget(180, 2, 180, 2, 2),
    "finish_norm bf16 TILE=1024 SPLITS=1 RANK=8 BEFORE OVERLAP": Budget(530, 2, 530, 2, 14),
    "finish_norm bf16 TILE=1024 SPLITS=3 RANK=8 BEFORE OVERLAP": Budget(620, 2, 620, 2, 18),
    "finish_norm bf16 TILE=2048 SPLITS=0 RANK=0 BEFORE OVERLAP": Budget(180, 2, 180, 2, 2),
    "finish_norm bf16 TILE=2048 SPLITS=2 RANK=0 BEFORE OVERLAP": Budget(300, 2, 300, 2, 8),
    "measure_tiles bf16 BASE MARKED": Budget(489, 5, 489, 5, 4),
    "measure_tiles bf16 BASE": Budget(469, 6, 469, 6, 4),
    "measure_tiles bf16 MARKED": Budget(342, 5, 342, 5, 4),
    "measure_tiles bf16": Budget(310, 5, 310, 5, 4),
    "measure_tiles fp32 BASE MARKED": Budget(470, 5, 470, 5, 8),
    "measure_tiles fp32 BASE": Budget(450, 6, 450, 6, 8),
    "measure_tiles fp32 MARKED": Budget(320, 5, 320, 5, 8),
    "measure_tiles fp32": Budget(284, 5, 284, 5, 8),
    "project_rows bf16": Budget(890, 10, loops=((319, 0),), registers=120),
    "project_rows fp32": Budget(884, 10, loops=((318, 0),), registers=120),
    "sample_rows bf16 GREEDY": Budget(681, 11, loops=((272, 0),), registers=80),
    "sample_rows bf16": Budget(725, 11, loops=((1086, 0),), registers=144),
    "sample_rows fp32 GREEDY": Budget(672, 11, loops=((270, 0),), registers=80),
    "sample_rows fp32": Budget(717, 11, loops=((1084, 0),), registers=144),
    "score_rows bf16 CHOSEN REMOVE": Budget(311, 0),
    "score_rows bf16 CHOSEN": Budget(310, 0),
    "score_rows bf16 REMOVE": Budget(604, 8, loops=((241, 0),), registers=64),
    "score_rows bf16": Budget(591, 7, loops=((239, 0),), registers=64),
    "score_rows fp32 CHOSEN REMOVE": Budget(306, 0),
    "score_rows fp32 CHOSEN": Budget(306, 0),
    "score_rows fp32 REMOVE": Budget(592, 8, loops=((245, 0),), registers=64),
    "score_rows fp32": Budget(585, 7, loops=((235, 0),), registers=64),
    "settle_rows": Budget(230, 0),
    "steer_tiles bf16 REMOVE": Budget(80, 0, 414, 0, 4),
    "steer_tiles bf16": Budget(79, 0, 421, 0, 4),
    "steer_tiles fp32 DELTA REMOVE": Budget(91, 0, 339, 0, 8),
    "steer_tiles fp32 REMOVE": Budget(92, 0, 387, 0, 8),
    "steer_tiles fp32": Budget(91, 0, 388, 0, 8),
    "support_rows bf16": Budget(658, 5, loops=((387, 5),)),
    "support_rows fp32": Budget(663, 5, loops=((430, 5),)),
    "topk_rows bf16 REMOVE": Budget(1588, 23, loops=((268, 0), (46, 0), (835, 13)), registers=128),
    "topk_rows bf16": Budget(1502, 23, loops=((260, 0), (44, 0), (860, 13)), registers=128),
    "topk_rows fp32 REMOVE": Budget(1609, 23, loops=((270, 0), (43, 0), (874, 13)), registers=136),
    "topk_rows fp32": Budget(1507, 23, loops=((262, 0), (42, 0), (881, 13)), registers=136),
}  # fmt: skip
