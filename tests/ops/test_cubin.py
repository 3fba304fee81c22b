"""Everything that is launched compiles for every target, without spills and within its registers.

No GPU is needed.
"""

import pytest

from . import cubins
from .test_budgets import broken, budgeted

TARGETS = (80, 90, 100)
SLACK = 1.35  # of instructions: the budgets are those of the oldest Triton


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    pytest.importorskip("triton")
    kernels = cubins.compiled(target)
    assert {x["name"] for x in kernels} == set(cubins.REGISTERS)
    if target == 90:
        found = broken({x["form"]: x for x in kernels if budgeted(x["form"])}, SLACK)
        assert not found, "\n".join(found)
    linear = [x for x in kernels if x["name"].split("_")[0] in ("linear", "finish", "attend")]
    assert all(x["overlaps"] == (target >= 90) for x in linear)
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= cubins.REGISTERS[kernel["name"]], kernel
        assert kernel["specialised"] == [], "a request could compile this anew"
        if kernel["aligned"] and kernel["reads"]:
            assert kernel["vectors"], f"no 16-byte loads: {kernel}"
        if target == 90:
            assert kernel["code"]["cancelled"] == [], f"x - x of a product: {kernel}"
        if kernel["overlaps"] and target == 90:
            assert kernel["code"]["early"] == [], f"before the kernel before has ended: {kernel}"
        # 164 KiB or more are there for the programs of a multiprocessor: two at once at least.
        assert kernel["shared"] <= 65536, kernel
