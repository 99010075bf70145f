"""What a compiled program sends between devices, counted in its text.

XLA's optimised text is a list of computations, and a computation a list of instructions that may
call others. From the entry down, each collective is counted with the bytes of its operands on one
device, times the trip counts of the loops around it, which XLA writes beside a loop where it knows
them. What a network really carries follows from that and the algorithm: a ring all-reduce of b
bytes sends 2 b (n - 1) / n from each of n devices.
"""

import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Traffic(NamedTuple):
    """Collectives of one run of a program, on one device.

    Attributes:
        sent: bytes of operands by kind.
        calls: how often each kind runs.
        unbounded: calls, counted once above, inside loops whose trip count XLA does not know.
    """

    sent: Counter[str]
    calls: Counter[str]
    unbounded: int

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sent.values())


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    rest: str


def count(text: str) -> Traffic:
    """Count the collectives in the optimised text of one module.

    Args:
        text: as from ``jax.jit(f).lower(...).compile().as_text()`` or a dump of XLA's.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("no entry computation: this is not the text of an HLO module")
    done: dict[str, Traffic] = {}

    def run(name: str) -> Traffic:
        if name not in done:
            total = Traffic(Counter(), Counter(), 0)
            for instruction in computations.get(name, {}).values():
                total = _add(total, visit(instruction, computations[name]))
            done[name] = total
        return done[name]

    def visit(instruction: _Instruction, around: dict[str, _Instruction]) -> Traffic:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            size = sum(_size(around[name].shape) for name in _operands(instruction.rest))
            return Traffic(Counter({kind: size}), Counter({kind: 1}), 0)
        called = [run(name) for name in _called(instruction.rest)]
        if instruction.opcode == "conditional" and called:
            return max(called, key=lambda traffic: traffic.total)
        total = Traffic(Counter(), Counter(), 0)
        for traffic in called:
            total = _add(total, traffic)
        if instruction.opcode == "while":
            trips = _TRIPS.search(instruction.rest)
            if trips is None:
                return total._replace(unbounded=sum(total.calls.values()))
            return Traffic(*(_times(part, int(trips[1])) for part in total))
        return total

    return run(entry)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str | None]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = None, {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[1]] = _Instruction(*instruction.groups()[1:])
    return computations, entry


def _operands(rest: str) -> list[str]:
    """Names of the operands: what stands before the closing bracket of the call."""
    end = depth = 0
    while end < len(rest) and depth >= 0:
        depth += (rest[end] in "([{") - (rest[end] in ")]}")
        end += 1
    # A comma inside a shape does not separate; a name is the last word of its part.
    parts = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", rest[: end - 1]).split(",")
    return [part.split()[-1].lstrip("%") for part in parts if part.strip()]


def _called(rest: str) -> list[str]:
    names = []
    for one, several in _CALLED.findall(rest):
        names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return names


def _size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays."""
    bits = 0
    for dtype, sizes in _SHAPE.findall(shape):
        width = re.match(r"[a-z]+(\d+)", dtype)
        each = int(width[1]) if width else 8 * (dtype == "pred")
        for size in filter(None, sizes.split(",")):
            each *= int(size.removeprefix("<="))
        bits += each
    return -(-bits // 8)


def _add(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(a.sent + b.sent, a.calls + b.calls, a.unbounded + b.unbounded)


def _times(part: Counter[str] | int, trips: int) -> Counter[str] | int:
    if isinstance(part, int):
        return part * trips
    return Counter({kind: n * trips for kind, n in part.items()})
