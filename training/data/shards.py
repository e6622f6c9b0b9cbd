"""Files of tokens: raw little-endian uint16, or shards with a header, as llm.c and modded-nanogpt write.

A shard begins with 256 little-endian int32: 20240520, the version 1, the number of tokens, and zeros.
No raw file of GPT-2's tokens begins so: its first token would be 55432. Format:
KellerJordan/modded-nanogpt at f411b3d3, ``records/track_3_optimization/train_gpt_simple.py``.
"""

from pathlib import Path
from typing import Any

import numpy as np

MAGIC, VERSION, HEADER = 20240520, 1, 256
BLOCK, MOST_BLOCKS = 1 << 20, 64
"""Up to 64 Mi tokens (128 MB) of a .bin, or of all shards together, are inspected."""

Stamp = tuple[int, int, int]


def tokens_of(path: Path, name: str = "") -> np.ndarray:
    """The tokens of a file, memory-mapped and read-only.

    Args:
      path: of the file, which may lose its name afterwards.
      name: what errors call it, by default its path.

    Raises:
      ValueError: for a size that is odd, a version that is not known, or a number of tokens that is not
        the one in the header.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from ravine.training.data.shards import tokens_of, write_shard
      >>> tokens_of(write_shard(Path(tempfile.mkdtemp()) / "shard.bin", [50256, 7])).tolist()
      [50256, 7]
    """
    name = name or str(path)
    size = path.stat().st_size
    if size % 2:
        raise ValueError(f"{name}: {size} bytes, odd, so not uint16; rename it or write it again.")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if size < 12:
        return np.asarray(tokens)
    magic, version, count = np.asarray(tokens[:6]).view("<i4").tolist()
    if magic != MAGIC:
        return np.asarray(tokens)
    if version != VERSION:
        raise ValueError(
            f"{name}: a shard of version {version}; only {VERSION} is known, write it again."
        )
    there = len(tokens) - 2 * HEADER
    if count != there:
        raise ValueError(
            f"{name}: {there:,} tokens, and its header says {count:,}; download it again."
        )
    if not count:
        raise ValueError(f"{name}: the shard has no tokens; leave it out.")
    return np.asarray(tokens[2 * HEADER :])


def write_shard(path: Path, tokens: Any) -> Path:
    """Writes a shard with its header, and returns its path."""
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def inspected(tokens: np.ndarray, digest: Any, shards: int = 1) -> int:
    """The largest token looked at; what is looked at goes into `digest`.

    Blocks are evenly spread, the first and the last among them; all of them where there are few.
    """
    blocks = -(-len(tokens) // BLOCK)
    most = max(2, MOST_BLOCKS // shards)
    largest = 0
    for block in np.linspace(0, blocks - 1, min(blocks, most)).astype(int).tolist():
        looked_at = tokens[block * BLOCK : (block + 1) * BLOCK]
        digest.update(looked_at.data)
        largest = max(largest, int(looked_at.max()))
    return largest


def stamp_of(path: Path) -> Stamp:
    """Size, time and inode of a file: others once it has changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
