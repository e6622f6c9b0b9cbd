"""Runs the commands of `docs/pods.md` and writes what they print below them.

    PYTHONPATH=.cache/tpu python docs/pods_tables.py [WORD ...]

after `make .cache/tpu/.installed`. With words, only commands that have all of them; the whole page
takes about eight minutes on two cores. A command is a block of the page that starts with
``$ python -m ravine plan``.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("pods.md")
BLOCK = re.compile(r"```\n\$ (python -m ravine plan(?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", re.DOTALL)


def printed(command: str) -> str:
    """What a command prints, without spaces at the ends of lines."""
    words = shlex.split(command.replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words[1:]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip())


def renewed(page: str, command: str, output: str) -> str:
    """The page with what one of its commands prints today."""
    return BLOCK.sub(
        lambda found: f"```\n$ {command}\n{output}\n```" if found[1] == command else found[0], page
    )


def main(words: list[str]) -> None:
    """Renews every block whose command has all words."""
    for command, _ in BLOCK.findall(PAGE.read_text()):
        if all(word in command for word in words):
            print(command, flush=True)
            output = printed(command)
            PAGE.write_text(renewed(PAGE.read_text(), command, output))


if __name__ == "__main__":
    main(sys.argv[1:])
