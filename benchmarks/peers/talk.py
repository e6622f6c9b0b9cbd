"""A process of another environment that answers a line of JSON with a line of JSON."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Peer:
    """`torch_side.py` under another interpreter, until `close`."""

    def __init__(self, python: str, threads: int):
        script = Path(__file__).with_name("torch_side.py")
        # The peer should have its usual threads, and none of our modules.
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OPENBLAS_NUM_THREADS")
        }
        self._process = subprocess.Popen(
            [python, str(script), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, question: str, **given: Any) -> Any:
        """The answer.

        Raises:
          RuntimeError: if the process ended instead; its error is on stderr.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"question": question, **given}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the peer ended with status {status} when asked for {question}.")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
