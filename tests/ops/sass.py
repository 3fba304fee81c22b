"""Read the machine code of a kernel: how many instructions a program executes, and which."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
KINDS = {"barriers": "BAR.", "shuffles": "SHFL", "wide_loads": "LDG.E.128", "loads": "LDG"}

# LDC reads the arguments of the launch.
ACCESSES = (
    "LDG", "LD.", "LDGSTS", "STG", "ST.", "ATOM", "RED.", "REDG", "UBLK", "UTMA", "EXIT", "PREEXIT",
)  # fmt: skip


class Instruction(NamedTuple):
    address: int
    guarded: bool  # by a predicate
    name: str
    operands: str


class Code:
    """The instructions of one kernel, and which may follow which."""

    def __init__(self, listing: str) -> None:
        found = (_LINE.search(line) for line in listing.splitlines())
        self.instructions = [
            Instruction(int(x[1], 16), x[2] not in (None, "UPT", "PT"), x[3], x[4])
            for x in found
            if x and x[3] != "NOP"
        ]
        place = {x.address: i for i, x in enumerate(self.instructions)}
        self.after = [list(self._after(i, place)) for i in range(len(self.instructions))]

    @classmethod
    def of(cls, cubin: Path, cuobjdump: Path) -> "Code":
        command = [cuobjdump, "-sass", cubin]
        return cls(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def _after(self, i: int, place: dict[int, int]) -> Iterator[int]:
        instruction = self.instructions[i]
        name = instruction.name.split(".")[0]
        ends = name in ("EXIT", "BRA", "RET", "BRX")
        if (not ends or instruction.guarded) and i + 1 < len(self.instructions):
            yield i + 1
        if name in ("BRA", "CALL"):
            targets = [int(x, 16) for x in _TARGET.findall(instruction.operands)]
            assert targets, instruction
            if place.get(targets[-1], i) != i:  # the padding behind the end jumps to itself
                yield place[targets[-1]]

    def shortest(self, through: str = "") -> list[int]:
        """The fewest instructions from the first to the end: no loop and no careful form.

        `through`: if given, an instruction of a name that begins so is among them.
        """
        start = 0, not through
        came: dict[tuple[int, bool], tuple[int, bool] | None] = {start: None}
        row = [start]
        while row:
            following = []
            for at in row:
                i, passed = at
                instruction = self.instructions[i]
                if instruction.name.startswith("EXIT") and not instruction.guarded and passed:
                    path, back = [], at
                    while back is not None:
                        path.append(back[0])
                        back = came[back]
                    return path[::-1]
                passed = passed or instruction.name.startswith(through)
                for j in self.after[i]:
                    if (j, passed) not in came:
                        came[j, passed] = at
                        following.append((j, passed))
            row = following
        raise ValueError(f"no way to the end through {through}")

    def early(self) -> list[str]:
        """What is done before the kernel before has ended: accesses to memory, ends and triggers.

        Prefetches are not among them, which show nothing of what they bring.
        """
        reached, todo = set(), [0]
        while todo:
            i = todo.pop()
            if i not in reached and not self.instructions[i].name.startswith("ACQBULK"):
                reached.add(i)
                todo += self.after[i]
        names = {self.instructions[i].name for i in reached}
        return sorted(x for x in names if x.startswith(ACCESSES))

    def cancelled(self) -> list[Instruction]:
        """Multiply-adds of two registers from which their own rounded product is subtracted.

        `x - x == 0` becomes one if x is a product: a rounding error, so the test fails where x is
        finite.
        """
        products: dict[str, set[str]] = {}
        found = []
        for instruction in self.instructions:
            words = instruction.operands.replace(".reuse", "").split(",")
            target, *operands = (x.strip() for x in words)
            if instruction.name == "FFMA" and operands[2].startswith("-"):
                if products.get(operands[2][1:]) == set(operands[:2]):
                    found.append(instruction)
            products.pop(target, None)
            if instruction.name == "FMUL" and all(x.startswith("R") for x in operands):
                products[target] = set(operands)
        return found

    def loops(self) -> list[set[int]]:
        """The innermost loops that load logits, in order, as sets of instructions."""
        before: list[list[int]] = [[] for _ in self.instructions]
        for i, following in enumerate(self.after):
            for j in following:
                before[j].append(i)
        bodies: dict[int, set[int]] = {}
        for i, following in enumerate(self.after):
            for head in following:
                if head <= i and i in self._reached(head):
                    body, todo = {head}, [i]
                    while todo:
                        at = todo.pop()
                        if at not in body:
                            body.add(at)
                            todo += before[at]
                    bodies[head] = bodies.get(head, set()) | body
        found = [body for _, body in sorted(bodies.items()) if self.count(body)["loads"]]
        return [x for x in found if not any(y < x for y in found)]

    def _reached(self, start: int) -> set[int]:
        found, todo = {start}, [start]
        while todo:
            new = set(self.after[todo.pop()]) - found
            found |= new
            todo += new
        return found

    def count(self, instructions: Iterable[int] | None = None) -> dict[str, int]:
        """How many instructions, and how many of each of `KINDS`; of all by default."""
        every = range(len(self.instructions)) if instructions is None else instructions
        names = Counter(self.instructions[i].name for i in every)
        kinds = {k: sum(n for x, n in names.items() if x.startswith(v)) for k, v in KINDS.items()}
        return {"instructions": sum(names.values())} | kinds

    def summary(self) -> dict[str, Any]:
        """The counts of the shortest way, of the shortest one that reads logits, of each loop."""
        wide = any(x.name.startswith(KINDS["wide_loads"]) for x in self.instructions)
        return {
            "shortest": self.count(self.shortest()),
            "reading": self.count(self.shortest(KINDS["wide_loads"])) if wide else None,
            "early": self.early(),
            "cancelled": self.cancelled(),
            "loops": [self.count(body) for body in self.loops()],
        }
