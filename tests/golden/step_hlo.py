"""The collectives of a whole train step, for `tests/test_roofline.py`.

    PYTHONPATH=.cache/tpu python tests/golden/step_hlo.py    # after `make .cache/tpu/.installed`

compiles the step of LLaMA-2 7B with one sequence per shard, for 8 chips of a v5p with the TPU's
compiler, in two minutes. Text that has nothing to do with communication or loop counts is removed.
"""

import re
from pathlib import Path

import jax
import ravine
from ravine.training.plan.collectives import KINDS
from ravine.training.plan.compile import auto, compiled_train_step, trainer_model
from ravine.training.plan.devices import mesh_of
from ravine.training.plan.hlo import Program
from ravine.training.shapes.presets import PRESETS

NAME, SIZES = "llama2-7b", {"fsdp": 4, "tensor": 2}


def pruned(text: str) -> str:
    """The lines that determine collectives and loop counts."""
    program = Program.parse(text)
    speaks = {name for name, lines in program.computations.items() if _speaks(lines)}
    while True:
        more = {
            name
            for name, lines in program.computations.items()
            for line in lines
            if {called for called, _ in program.calls(name, line)} & speaks
        }
        if more <= speaks:
            break
        speaks |= more
    conditions = set(re.findall(r"condition=%?([\w.\-]+)", text))
    kept, inside = [], False
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = header[2] in speaks | conditions | {program.entry}
            line = f"{header[1] or ''}%{header[2]} () -> () {{"
        elif inside and " = " in line:
            words = re.sub(
                r", (metadata|backend_config|frontend_attributes|sharding)=\{.*", "", line
            )
            words = re.sub(r"(?<=\])\{[\d,]*(:[^{}]*)?\}", "", words)
            op = re.search(r"[\]})] ([\w\-]+)\(", words)
            if op is None or not _kept(op[1], words, speaks):
                continue
            line = words
        if inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _speaks(lines) -> bool:
    return any(line.op.removesuffix("-start") in KINDS for line in lines)


def _kept(op: str, line: str, speaks: set[str]) -> bool:
    if op.removesuffix("-start") in KINDS or op in ("while", "conditional"):
        return True
    if op in ("fusion", "call", "async-start"):
        return bool(set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line)) & speaks)
    if op == "tuple" or "pred[] compare(" in line:
        return True
    scalar = re.search(r"= [su]32\[\]", line) is not None
    return scalar and op in ("add", "copy", "constant", "get-tuple-element", "bitcast")


def main():
    mesh, _ = mesh_of("v5p:2x2x2", SIZES)
    model = trainer_model(NAME, PRESETS[NAME])
    compiled = compiled_train_step(model, ravine.adamw(1e-3), auto(mesh), SIZES["fsdp"])
    path = Path(__file__).with_name("llama2_7b_step.txt")
    path.write_text(pruned(compiled.program.as_text()))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
