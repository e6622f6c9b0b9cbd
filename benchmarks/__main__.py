"""python benchmarks COMMAND [FLAGS]: one command per question; most write their part of the page."""

import runpy
import sys
from pathlib import Path

COMMANDS = {
    "first_order": "update and compile time of SGD, Adam and similar ones against Optax's",
    "muon": "update, compile time and temporary memory of Muon against Optax's",
    "shampoo": "compile time and steps of Shampoo and SOAP against Meta's, PyTorch's and Google's",
    "peers": "updates of AdamW, Muon, SOAP and Shampoo against PyTorch's and Optax's",
    "train_step": "a step of the trainer's model against the same in PyTorch",
    "limit": "AdamW against the measured bandwidth, Muon against the measured rate of products",
    "growth": "update and compile time over parameters and leaves, with slopes",
    "compile_time": "growth of compile time from 8 to 128 equal leaves (printed only)",
    "moves": "moves between files of a traced update, lines by kind (printed only)",
    "memory": "bytes of state, bfloat16 and float32",
    "stability": "losses, guards and attention devices",
    "schedules": "what evaluating a schedule costs in a step (printed only)",
    "gpu": "updates, guards and train steps on a GPU, against its limits and PyTorch",
    "hard": "problems on which optimizers fail: pass or fail, ours and Optax's",
    "guard": "a fast subset, its ratios against the bounds of guard.json; status 1 if one is exceeded",
}
FILES = {"peers": "against"}  # where a command has the name of a folder
HERE = Path(__file__).parent


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {command:<14}{what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: python benchmarks COMMAND [FLAGS]", "", *lines]))
        return 0 if name in ("-h", "--help") else 2
    file = f"{FILES.get(name, name)}.py"
    sys.argv = [f"benchmarks/{file}", *sys.argv[2:]]
    sys.path.insert(0, str(HERE))
    runpy.run_path(str(HERE / file), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
