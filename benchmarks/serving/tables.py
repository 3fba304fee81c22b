"""The table of the server under load."""

from typing import Any

from benchmarks.engine.tables import source
from benchmarks.tables import number, table


def serving(result: dict[str, Any]) -> str:
    """Format what each kind of load came to."""
    cases = {case["name"]: case for case in result["cases"]}
    rows = []
    if many := cases.get("test_many_clients"):
        text = f"{number(many['alone'])} and {number(many['together'])}"
        rows.append(
            [f"tokens per second, one client and {many['clients']}", text, number(many["ratio"])]
        )
    if joins := cases.get("test_others_join"):
        for which in ("median", "p99"):
            alone, beside = (joins[name][which] * 1e3 for name in ("alone", "beside"))
            text = f"{number(alone)} and {number(beside)}"
            rows.append(
                [f"ms between tokens, alone and while others join: {which}", text,
                 number(beside / alone)]
            )  # fmt: skip
    if short := cases.get("test_short_requests"):
        first, last = short["memory_mib"][1], short["memory_mib"][-1]
        rows.append(
            [f"{short['requests']:,} short requests: right, wrong, left by their client",
             f"{short['right']:,}, {short['wrong']}, {short['gone']}", "-"]
        )  # fmt: skip
        rows.append(
            ["MiB after a tenth of them and after all", f"{first:,} and {last:,}",
             number(last / first)]
        )  # fmt: skip
    return (
        f"{table(['SmolLM2-135M, float32', 'measured', 'ratio'], rows)}\n\nServer and clients "
        "share the processor. The short requests go to a random model of two layers. "
        f"{source(result)}."
    )


TABLES = (("docs/serving.md", "serving", "cpu_serving", serving),)
