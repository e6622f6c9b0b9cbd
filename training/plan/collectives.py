"""What a compiled program communicates, read from its text.

Bytes are those that one device sends, by the ring each collective is usually made of. In a group of
:math:`g` devices, for the bytes of an operand :math:`x` or a result :math:`y` on one device:

==================  =============================================================================
collective          bytes sent
==================  =============================================================================
all-gather          :math:`y (g - 1) / g`
reduce-scatter      :math:`x (g - 1) / g = y (g - 1)`
all-reduce          :math:`2 y (g - 1) / g`: a reduce-scatter, then an all-gather
all-to-all          :math:`y (g - 1) / g`: one part stays
ragged-all-to-all   :math:`\\min(x, y) (g - 1) / g`: the text has buffers, of which what is used is less
collective-permute  :math:`y`, times the share of devices that send
==================  =============================================================================
"""

import dataclasses
import math
import re

import numpy as np

from .hlo import Instruction, Program, Runs

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=\{\{([\d,]*)\}|replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")
# XLA for TPU writes a reduce-scatter as an all-reduce and a slice, in a computation named so.
_SCATTERED = "all-reduce-scatter"
# It writes a collective that runs beside products three times or more: in a computation that an
# instruction named async-collective-start calls, in every fusion with a product, and where it ends.
_BESIDE, _ENDED = "async_collective_fusion", "async-collective-done"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a compiled program, at one place it is called from."""

    kind: str
    """One of `KINDS`."""
    bytes: int
    """Of its result on one device; of a ragged one, of operand or result, whichever is smaller."""
    sent: float
    """Bytes one device sends each time, by the rules above."""
    times: int = 1
    """How often it runs in one call; loops whose length is not in the text count once."""
    always: bool = True
    """Whether it is in no branch, and in no loop of unknown length."""
    in_loop: bool = False
    """Whether a loop runs it."""
    group: tuple[int, ...] = ()
    """Positions in the mesh of devices that communicate with one another, of the first of the
    groups."""

    @property
    def total(self) -> float:
        """Bytes one device sends in one call of the program."""
        return self.sent * self.times


def collectives(text: str, devices: int = 1) -> list[Collective]:
    r"""The collectives of a program, from ``compiled.as_text()``.

    Args:
      text: of the compiled program.
      devices: how many it was compiled for: the size of groups that the text leaves out.

    Example:
      >>> from ravine.training.plan.collectives import collectives
      >>> found = collectives("ENTRY %main (x: f32[4]) -> f32[8] {\n"
      ...                     "  ROOT %y = f32[8]{0} all-gather(%x), replica_groups={{0,1}}\n}")
      >>> [(c.kind, c.bytes, c.sent) for c in found]
      [('all-gather', 32, 16.0)]
    """
    program, found = Program.parse(text), []
    looped, continued = _looped(program), _continued(program)
    for name, lines in program.computations.items():
        if name in continued:
            continue
        for line in lines:
            kind = line.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and name.startswith(_SCATTERED):
                kind = "reduce-scatter"
            for runs in program.runs.get(name, ()):
                found.append(_collective(kind, line, lines, runs, devices, name in looped))
    return found


def _collective(
    kind: str,
    line: Instruction,
    lines: tuple[Instruction, ...],
    runs: Runs,
    devices: int,
    in_loop: bool,
) -> Collective:
    members = _members(kind, line, devices)
    group = len(members) if kind != "collective-permute" else max(1, devices)
    size = _result(kind, line)
    if kind == "ragged-all-to-all":
        size = min(size, _operand(line, lines, size))
    if line.op == "all-reduce" and kind == "reduce-scatter":
        size //= group  # what is kept of it
    share = (group - 1) / group
    sent = {
        "all-reduce": 2 * share,
        "reduce-scatter": group - 1,
        "collective-permute": _senders(line) / max(1, devices) if devices > 1 else 1,
    }.get(kind, share) * size
    return Collective(kind, size, sent, runs.times, runs.always, in_loop, members)


def _continued(program: Program) -> set[str]:
    """Computations whose collectives were started, and counted, elsewhere."""
    ended = {
        called
        for name, lines in program.computations.items()
        for line in lines
        if line.name.startswith(_ENDED)
        for called, _ in program.calls(name, line)
    }
    return ended | {name for name in program.computations if name.startswith(_BESIDE)}


def _looped(program: Program) -> set[str]:
    """Computations that a loop runs, whatever its length."""
    looped: set[str] = set()
    waiting = [
        body
        for lines in program.computations.values()
        for line in lines
        if line.op == "while"
        for body in re.findall(r"\bbody=%?([\w.\-]+)", line.attributes)
    ]
    while waiting:
        name = waiting.pop()
        if name not in looped:
            looped.add(name)
            for line in program.computations.get(name, ()):
                waiting += [called for called, _ in program.calls(name, line)]
    return looped


def _result(kind: str, line: Instruction) -> int:
    """Bytes of what arrives."""
    shapes = _SHAPE.findall(line.type)
    if line.op.endswith("-start") and kind != "all-reduce":
        # What starts asynchronously returns operands, then results, then counters of its own.
        while len(shapes) > 2 and shapes[-1] in (("u32", ""), ("s32", "")):
            shapes = shapes[:-1]
        shapes = shapes[len(shapes) // 2 :]
    return sum(_size(*shape) for shape in shapes)


def _operand(line: Instruction, lines: tuple[Instruction, ...], default: int) -> int:
    """Bytes of the first operand."""
    types = _SHAPE.findall(line.literal.split("%")[0])
    if not types:
        operand = next((x for x in lines if line.operands and x.name == line.operands[0]), None)
        types = _SHAPE.findall(operand.type) if operand else []
    return _size(*types[0]) if types else default


def _members(kind: str, line: Instruction, devices: int) -> tuple[int, ...]:
    """The first devices that communicate with one another."""
    if kind == "collective-permute":
        return next(((a, b) for a, b in _pairs(line) if a != b), (0,))
    if named := _AXES.search(line.attributes):
        return _along(*named.groups())
    found = _GROUPS.search(line.attributes)
    if found is None:
        return tuple(range(max(1, devices)))
    if found[1] is not None:
        ids = [int(x) for x in found[1].split(",") if x]
        return tuple(ids or range(max(1, devices)))
    # As [groups, size] <= [dimensions] T(permutation).
    return tuple(_counted(found[4], found[5]).reshape(int(found[2]), int(found[3]))[0].tolist())


def _counted(shape: str, order: str | None) -> np.ndarray:
    """A transposed count, as ``[4,2]T(1,0)``."""
    sizes = [int(x) for x in shape.split(",")]
    axes = [int(x) for x in order.split(",")] if order else list(range(len(sizes)))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)


def _along(mesh: str, shape: str | None, order: str | None, axes: str) -> tuple[int, ...]:
    """Those along some axes of a mesh, as ``'a'=2,'b'=4`` and ``'b'``, or a part of one, ``'b':(2)2``.

    Devices are in the order of a transposed count, or simply counted. An axis of which a part is named
    is cut into three: (2), the part of 2, and what is left.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = {name: (int(a or 1), int(b or sizes[name])) for name, a, b in _AXIS.findall(axes)}
    ids = _counted(shape or str(math.prod(sizes.values())), order).ravel()
    taken: list[int | slice] = []
    for name, size in reversed(sizes.items()):  # ids of all parts to leave out are 0
        before, part = wanted.get(name, (1, 1))
        ids = ids.reshape(-1, before, part, size // before // part, *ids.shape[1:])
        taken = [0, slice(None), 0, *taken]
    return tuple(ids[(0, *taken)].ravel().tolist())


def _pairs(line: Instruction) -> list[tuple[int, int]]:
    found = _PAIRS.search(line.attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    return [(int(source), int(target)) for source, target in pairs]


def _senders(line: Instruction) -> int:
    """How many devices send to another one."""
    return sum(source != target for source, target in _pairs(line))


def _size(dtype: str, dimensions: str) -> int:
    bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or [8])[0])
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
