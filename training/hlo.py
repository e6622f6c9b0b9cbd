"""What a compiled program communicates, read from its text."""

import dataclasses
import re

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-gather|all-reduce|ragged-all-to-all|all-to-all|collective-permute"
    r"|reduce-scatter)(?P<start>-start)?\("
)
_RESULT = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>[a-z]+\d*[a-z0-9]*\[[\d,]*\])")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a compiled program."""

    kind: str
    """As all-gather or all-to-all."""
    bytes: int
    """Of its result on one device. A ragged one has at most these on average: of operand or result,
    whichever is smaller."""
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    r"""The collectives of a program, from ``compiled.as_text()``.

    Example:
      >>> from ravine.training.hlo import collectives
      >>> collectives("ENTRY %main (x: f32[4]) -> f32[8] {\n"
      ...             "  ROOT %y = f32[8]{0} all-gather(%x), dimensions={0}\n}")
      [Collective(kind='all-gather', bytes=32, in_loop=False)]
    """
    current, calls, bodies, found, results = "", {}, set(), [], {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header.group(1)
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"[\w.\-]+", branches)
        calls.setdefault(current, set()).update(called)
        bodies.update(re.findall(r"body=%?([\w.\-]+)", line))
        if result := _RESULT.match(line):
            results[result["name"]] = _size(*_SHAPE.findall(result["type"])[0])
        if match := _COLLECTIVE.search(line):
            sizes = [_size(*shape) for shape in _SHAPE.findall(match["type"])]
            # What starts asynchronously returns its operands, then its results.
            size = sizes[-1] if match["start"] and match["kind"] != "all-reduce" else sum(sizes)
            if match["kind"] == "ragged-all-to-all":
                operand = line[match.end() :].split(",")[0].rpartition(" ")[2].lstrip("%")
                size = min(size, results.get(operand, size))
            found.append((match["kind"], size, current))
    looped, waiting = set(), list(bodies)
    while waiting:
        computation = waiting.pop()
        if computation not in looped:
            looped.add(computation)
            waiting += calls.get(computation, ())
    return [Collective(kind, size, inside in looped) for kind, size, inside in found]


def _size(dtype: str, dimensions: str) -> int:
    bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or [8])[0])
    count = 1
    for size in filter(None, dimensions.split(",")):
        count *= int(size)
    return count * bits // 8
