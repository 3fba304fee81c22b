"""How long a launch should take: from counts of its machine code, and from constants of a device.

A launch takes what a program takes alone, and then as long as all of them keep the device busy:
its memory, its issue slots, or its room for programs, whichever is busy longest.
"""

from typing import Any, NamedTuple

# Clock cycles until a result is there: arithmetic, shared memory, L2, memory. Hopper in table 3 of
# Nagy et al., 2023, doi:10.1016/j.ultsonch.2023.106546.
ARITHMETIC, SHARED, L2, MEMORY = 4, 20, 200, 400
# Fitted to two figures of an H200, with the counts of the kernels that gave them: `steer` in
# bfloat16, on rows like a model's, N = 1 and N = 1024. Every other figure tests them.
LAUNCH = 1.40  # microseconds until a launch begins
ISSUED = 0.58  # share of the issue slots that independent instructions reach
# Of a multiprocessor of sm_90: warp instructions per cycle, registers, warps.
SLOTS, REGISTERS, WARPS = 4, 65536, 64
# GB/s of the data sheets (SXM). What is measured on one GPU is scaled to the other by them.
SHEETS = {"H100": 3350.0, "H200": 4800.0}


class Device(NamedTuple):
    """What a GPU of sm_90 can do."""

    multiprocessors: int
    clock: float  # GHz
    read: float  # GB/s
    copy: float  # GB/s; bytes read and bytes written count
    l2_bytes: int

    @property
    def write(self) -> float:
        """GB/s of writing: what takes the rest of the time of a copy."""
        return 1 / (2 / self.copy - 1 / self.read)


def device(result: dict[str, Any], name: str) -> Device:
    """Return the device of gpu.json, with the bandwidth of `name` if that is another one."""
    machine, bandwidth = (result["sections"][x]["result"] for x in ("machine", "bandwidth"))
    measured = next(x for x in SHEETS if x in machine["device"])
    scale = SHEETS[name] / SHEETS[measured]
    return Device(
        machine["multiprocessors"],
        machine["clock_rate, MHz"] / 1e3,
        bandwidth["read GB/s"] * scale,
        bandwidth["GB/s"] * scale,
        machine["L2, bytes"],
    )


class Launch(NamedTuple):
    """Programs of one kernel, and what each of them does."""

    programs: int
    warps: int
    chained: float = 0.0  # instructions of which each waits for the one before
    parallel: float = 0.0  # instructions on many pairs of logits at once
    active: float = 1.0  # share of the programs that have the parallel ones
    barriers: float = 0.0
    from_l2: float = 0.0  # reads of which each waits for the one before
    from_memory: float = 0.0
    bytes_read: float = 0.0  # from memory
    bytes_written: float = 0.0
    registers: int = 0  # per thread; 0 if they do not limit the programs that run at once

    @property
    def at_once(self) -> int:
        """Programs that fit a multiprocessor; a thread's registers come in eights."""
        if not self.registers:
            return WARPS // self.warps
        return REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)


def microseconds(launch: Launch, on: Device) -> float:
    """Return how long a launch takes, from the end of the one before."""
    share = launch.warps / SLOTS  # cycles in which all schedulers issue one instruction
    alone = (
        launch.chained * max(ARITHMETIC, share)
        + launch.parallel * share / ISSUED
        + launch.barriers * 2 * SHARED  # what one thread writes and another one reads
        + launch.from_l2 * L2
        + launch.from_memory * MEMORY
    ) / on.clock
    each = launch.programs / on.multiprocessors
    issued = (launch.chained + launch.active * launch.parallel / ISSUED) * share / on.clock
    memory = launch.bytes_read / on.read + launch.bytes_written / on.write
    busy = max(launch.programs * memory, each * issued, (each / launch.at_once - 1) * alone)
    return LAUNCH + (alone + busy) / 1e3
