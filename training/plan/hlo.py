"""A compiled program read from its text: its computations, and how often each of them runs.

The compiler writes every computation once. One that is the body of a loop runs as often as the loop, and
one that is a branch runs only when the branch is taken; both follow from the text.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_ALIASES = ("copy", "bitcast", "optimization-barrier", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    """As ``f32[8,128]{1,0}``, or a tuple of them in parentheses."""
    op: str
    operands: tuple[str, ...]
    """Names."""
    literal: str
    """What stands in the parentheses."""
    attributes: str
    """What stands behind them."""
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often something runs in one call of the program."""

    times: int
    """Each loop of unknown length, and each branch, taken once."""
    always: bool
    """Whether it is in no branch, and in no loop of unknown length."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program, from ``compiled.as_text()``.

    Example:
      >>> from ravine.training.plan.hlo import Program
      >>> program = Program.parse("ENTRY %main (x: f32[4]) -> f32[4] {\\n"
      ...                         "  ROOT %y = f32[4]{0} negate(%x)\\n}")
      >>> program.computations["main"][0].op
      'negate'
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """The program of a text."""
        found: dict[str, list[Instruction]] = {}
        current, entry = "", ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = header["name"]
                found[current] = []
                entry = current if header["entry"] else entry
            elif current and " = " in line and (instruction := _instruction(line)):
                found[current].append(instruction)
        return cls({name: tuple(lines) for name, lines in found.items()}, entry)

    @functools.cached_property
    def runs(self) -> dict[str, list[Runs]]:
        """By computation, one entry for each place that it is called from."""
        found: dict[str, list[Runs]] = {}

        def visit(name: str, runs: Runs) -> None:
            found.setdefault(name, []).append(runs)
            for instruction in self.computations.get(name, ()):
                for called, times in self.calls(name, instruction):
                    always = runs.always and times is not None
                    visit(called, Runs(runs.times * (1 if times is None else times), always))

        visit(self.entry, Runs(1, True))
        return found

    def calls(self, inside: str, instruction: Instruction) -> Iterator[tuple[str, int | None]]:
        """Computations an instruction calls, and how often; None where that is not known."""
        if instruction.op == "while":
            body = re.search(r"\bbody=%?([\w.\-]+)", instruction.attributes)
            if body:
                yield body[1], self._trips(inside, instruction)
            return
        for called in _CALLED.findall(instruction.attributes):
            yield called, 1
        for many, one in _BRANCHES.findall(instruction.attributes):
            for called in re.findall(r"[\w.\-]+", many or one):
                yield called, None

    def _trips(self, inside: str, loop: Instruction) -> int | None:
        """How often a loop runs; None where it is not in the text.

        CPUs and GPUs write it down. For TPUs it is read off a counter: the number it starts from, the
        number it is compared with, and what is added to it each time.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
        condition, body = (
            self.computations.get(names.get(k, ""), ()) for k in ("condition", "body")
        )
        test = next((line for line in condition if line.is_root), None)
        if test is None or test.op != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (_by_name(condition, operand) for operand in test.operands)
        index, limit = _element(condition, counter), _constant(condition, bound)
        start = self._started(inside, loop, index)
        step = _step(body, index)
        if index is None or limit is None or start is None or not step:
            return None
        return max(0, -(-(limit - start) // step))

    def _started(self, inside: str, loop: Instruction, index: int | None) -> int | None:
        """The value an element of a loop's tuple starts from."""
        lines = self.computations[inside]
        carried = _by_name(lines, loop.operands[0])
        if index is None or carried is None or carried.op != "tuple":
            return None
        return _constant(lines, _by_name(lines, carried.operands[index]))


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.strip().partition(" = ")
    is_root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    op, _, _ = right[end:].strip().partition("(")
    opening = right.find("(", end)
    if end <= 0 or opening < 0 or not re.fullmatch(r"[\w\-]+", op):
        return None
    closing = _closing(right, opening)
    literal = right[opening + 1 : closing]
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"),
        right[:end],
        op,
        tuple(_NAME.findall(literal)),
        literal,
        right[closing + 1 :],
        is_root,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis closes that opens at `opening`."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def _by_name(lines: tuple[Instruction, ...], name: str) -> Instruction | None:
    """The instruction of that name, or what it is a copy of."""
    found = next((line for line in lines if line.name == name), None)
    while found is not None and found.op in _ALIASES and found.operands:
        source = found.operands[0]
        found = next((line for line in lines if line.name == source), None)
    return found


def _constant(lines: tuple[Instruction, ...], found: Instruction | None) -> int | None:
    is_whole = found is not None and found.op == "constant" and found.literal.lstrip("-").isdigit()
    return int(found.literal) if found is not None and is_whole else None


def _element(lines: tuple[Instruction, ...], found: Instruction | None) -> int | None:
    """Which element of a computation's tuple this is."""
    if found is None or found.op != "get-tuple-element":
        return None
    index = re.search(r"\bindex=(\d+)", found.attributes)
    return int(index[1]) if index else None


def _step(body: tuple[Instruction, ...], index: int | None) -> int | None:
    """What a loop's body adds to an element of its tuple."""
    root = next((line for line in body if line.is_root), None)
    if index is None or root is None or root.op != "tuple":
        return None
    added = _by_name(body, root.operands[index])
    if added is None or added.op != "add":
        return None
    parts = [_by_name(body, operand) for operand in added.operands]
    constants = [_constant(body, part) for part in parts]
    is_counter = [_element(body, part) == index for part in parts]
    if is_counter[0]:
        return constants[1]
    return constants[0] if is_counter[1] else None
