"""How often a traced update moves between files, and how many lines of the package are documentation.

    python benchmarks moves            # ten seconds; printed only
    python benchmarks moves --calls    # also list caller and callee

A move is a call of one of Ravine's functions from another file of Ravine's; "in turn" counts calls and
returns that are in a different file than the one before. The tree is one leaf of 64 x 64, unsharded; it
is traced twice, and the second time counts.
"""

import argparse
import ast
import collections
import functools
import io
import sys
import tokenize
from pathlib import Path

import jax
import jax.numpy as jnp
import ravine

ROOT = Path(ravine.__file__).parent
FOLDERS = ("core", "optimizers", "schedules", "stability", "training")
NAMES = ("shampoo", "soap", "kl_shampoo", "muon", "adamw")


@functools.cache
def is_ours(filename: str) -> bool:
    """Whether a file is the library's; this one and a virtual environment in the checkout are not."""
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS


def moves(name: str) -> tuple[collections.Counter, int]:
    """Moves of an update by caller and callee, and calls in a different file than the one before."""
    params = {"kernel": jnp.ones((64, 64))}
    options = {} if name == "adamw" else {"rules": [("", "matrix")]}
    tx = getattr(ravine, name)(1e-3, **options)
    state = tx.init(params)
    found, in_turn, last = collections.Counter(), 0, ""

    def seen(frame, event, argument):
        nonlocal in_turn, last
        del argument
        here = frame.f_code.co_filename
        if event != "call" or not is_ours(here):
            return
        in_turn += here != last
        last = here
        there = frame.f_back.f_code.co_filename if frame.f_back else ""
        if is_ours(there) and there != here:
            call = [str(Path(f).relative_to(ROOT)) for f in (there, here)]
            found[f"{call[0]} -> {call[1]}:{frame.f_code.co_name}"] += 1

    for _ in range(2):
        found.clear()
        in_turn, last = 0, ""
        sys.setprofile(seen)
        try:
            jax.make_jaxpr(lambda *arguments: tx.update(*arguments))(params, state, params)
        finally:
            sys.setprofile(None)
    return found, in_turn


def lines(folder: Path) -> dict[str, int]:
    """Lines of a folder's Python files by kind."""
    count = collections.Counter()
    for path in folder.rglob("*.py"):
        text = path.read_text()
        total = text.count("\n")
        documented = set()
        for node in ast.walk(ast.parse(text)):
            # Docstrings, including those of fields.
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                documented |= set(range(node.lineno, node.end_lineno + 1))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = {
            t.start[0]
            for t in tokens
            if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")
        }
        blank = {at for at, line in enumerate(text.splitlines(), 1) if not line.strip()}
        count["all"] += total
        count["docstrings"] += len(documented)
        count["comments"] += len(comments - documented)
        count["blank"] += len(blank - documented)
    count["code"] = 2 * count["all"] - sum(count.values())
    return dict(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", action="store_true")
    arguments = parser.parse_args()
    for name in NAMES:
        found, in_turn = moves(name)
        print(f"{name:<12}{sum(found.values()):>5} moves{in_turn:>6} in turn")
        for call, times in found.most_common() if arguments.calls else ():
            print(f"{times:>6} {call}")
    for folder in ("optimizers", "core"):
        print(folder, lines(ROOT / folder))


if __name__ == "__main__":
    main()
