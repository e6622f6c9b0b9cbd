"""Many matrices, few kernels: matrices of one shape are processed as one batch.

With one kernel per leaf, compile time grows with the number of leaves, and small matrices leave a
device idle. Here all pieces are brought into the wide form (rows <= columns), pieces of one shape are
joined, and the joint batch is cut where its temporary memory would exceed a bound.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ....core.once import after
from ....core.platform import platform
from ..mesh.exchange import whole_matrices
from ..mesh.placement import Names
from ..mesh.traffic import OnShards, cheapest

WHOLE_MATRICES = {"cpu": 2**19}
"""Elements that `map_matrices` processes at once, by platform; `WHOLE_MATRICES_ELSEWHERE` on all others.
A step of Newton–Schulz reads each matrix several times, and 2 MB of them stay in the caches of two
cores."""
WHOLE_MATRICES_ELSEWHERE = 2**25

Pieces = Sequence[jax.Array]  # of [L, M, N], the shapes may differ


def map_matrices(
    function: Callable[[jax.Array], jax.Array],
    pieces: Pieces,
    max_elements: int | None = None,
    *,
    names: Sequence[Sequence[Names]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> list[jax.Array]:
    """Applies `function` to all matrices, those of equal shape together.

    The function must commute with transposition, as orthogonalization does: tall matrices are passed to
    it transposed. Every batch of whole matrices goes through this function. On a mesh, each matrix is
    processed by one device, see `whole_matrices`, or its columns stay where they are, see `cheapest`.

    Args:
      function: maps a batch `[K, m, n]`, m <= n, to one of the same shape, matrix by matrix.
      pieces: batches `[L, M, N]`.
      max_elements: bound on the elements processed at once, and so on temporary memory; at least one
        matrix is processed. ``None`` takes 2**19 on CPU and 2**25 (128 MB in float32) elsewhere.
      names: inside `per_shard`, for each piece the mesh axes that cut its batch, rows and columns.
      sizes: inside `per_shard`, the sizes of all mesh axes.

    Returns:
      The results, in the order and shapes of the pieces.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.batch.batches import map_matrices
      >>> pieces = [jnp.ones((2, 3, 4)), jnp.ones((1, 4, 3)), jnp.ones((1, 2, 2))]
      >>> shapes = []
      >>> results = map_matrices(lambda batch: shapes.append(batch.shape) or -batch, pieces)
      >>> shapes, [result.shape for result in results]
      ([(3, 3, 4), (1, 2, 2)], [(2, 3, 4), (1, 4, 3), (1, 2, 2)])
    """
    if max_elements is None:
        max_elements = WHOLE_MATRICES.get(platform(), WHOLE_MATRICES_ELSEWHERE)
    sizes = {} if sizes is None else sizes
    cuts = [((), (), ())] * len(pieces) if names is None else names
    parts = lambda names: math.prod(sizes[name] for name in names)
    groups: dict[Any, list[tuple[int, bool]]] = {}
    for index, (piece, (batch, *sides)) in enumerate(zip(pieces, cuts, strict=True)):
        whole = [(n * parts(names), names) for n, names in zip(piece.shape[1:], sides, strict=True)]
        # For square matrices the cut decides, so that those cut by rows join those cut by columns.
        is_wide = whole[0] <= whole[1]
        key = (batch, *sorted(whole), str(piece.dtype))
        groups.setdefault(key, []).append((index, is_wide))
    results: list[jax.Array] = list(pieces)
    for (batch_names, (rows, row_names), (columns, column_names), _), members in groups.items():
        if rows * columns == 0:
            continue
        batch = _join(
            [
                pieces[index] if wide else jnp.swapaxes(pieces[index], 1, 2)
                for index, wide in members
            ]
        )
        most = max(1, max_elements // (rows * columns))
        if sizes:
            cut = (batch_names, row_names, column_names)
            done = _on_mesh(function, batch, most, cut, sizes)
        else:
            done = in_chunks(function, batch, most)
        lengths = [pieces[index].shape[0] for index, _ in members]
        for (index, wide), part in zip(members, unjoin([done], lengths)[0], strict=True):
            results[index] = part if wide else jnp.swapaxes(part, 1, 2)
    return results


def _on_mesh(
    function: Callable[[jax.Array], jax.Array],
    batch: jax.Array,
    most: int,
    cut: Sequence[Names],
    sizes: Mapping[str, int],
) -> jax.Array:
    """`function` of a batch whose matrices mesh axes cut, in the way that sends the fewest bytes."""
    batch_names, rows, columns = cut
    way = cheapest(function, batch, rows, columns, sizes)
    shared = {n: size for n, size in sizes.items() if n not in (*batch_names, *way.kept)}
    if way.kept and isinstance(function, OnShards):
        work = functools.partial(function, summed=way.kept)
    else:
        work = functools.partial(in_chunks, function, most=most)
    exchanged = tuple(name for name in columns if name not in way.kept)
    return whole_matrices(work, batch, rows, exchanged, shared, ragged=way.ragged)


def in_chunks(function: Callable[..., Any], batch: Any, most: int, beside: Any = None) -> Any:
    """`function` on `most` members of a batch at a time, with results written in place.

    Args:
      function: maps a part of the batch to one of the same shapes.
      batch: a tree of arrays with the batch as first axis.
      most: members processed at once.
      beside: a second argument, also a tree, cut like the batch but only read.
    """
    count = jax.tree.leaves(batch)[0].shape[0]

    def applied(part: Any, start: Any, length: int) -> Any:
        if beside is None:
            return function(part)
        whole = length == count
        return function(
            part, beside if whole else jax.tree.map(lambda x: part_of(x, start, length), beside)
        )

    if count <= most:
        return applied(batch, 0, count)
    # Chunks of one size share one program; a remainder would be compiled as a second one.
    size = max(divisor for divisor in range(1, most + 1) if count % divisor == 0)
    if 2 * size < most:
        size = most

    def write(start: Any, length: int, batch: Any) -> Any:
        chunk = jax.tree.map(lambda x: part_of(x, start, length), batch)
        new = applied(chunk, start, length)
        return jax.tree.map(lambda x, new: with_part(x, new, start), batch, new)

    whole, rest = divmod(count, size)
    batch = jax.lax.fori_loop(0, whole, lambda at, batch: write(at * size, size, batch), batch)
    return write(whole * size, rest, batch) if rest else batch


def joined(
    function: Callable[..., Any], *parts: Sequence[Any], most: int | None = None
) -> list[Any]:
    """`function` of several batches joined into one, with the result split again.

    Args:
      function: acts on trees of arrays `[K, ...]`, member by member.
      parts: for each argument, a list of such trees of equal structure.
      most: members processed at once, as for `in_chunks`; None for all.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.batch.batches import joined
      >>> [x.shape for x in joined(jnp.negative, [jnp.ones((2, 3)), jnp.ones((1, 3))])]
      [(2, 3), (1, 3)]
    """
    trees = [jax.tree.map(lambda *leaves: _join(leaves), *batches) for batches in parts]
    lengths = [jax.tree.leaves(batch)[0].shape[0] for batch in parts[0]]
    done = function(*trees) if most is None else in_chunks(function, trees[0], most, *trees[1:])
    arrays, structure = jax.tree.flatten(done)
    cut = unjoin(arrays, lengths)
    return [jax.tree.unflatten(structure, part) for part in zip(*cut, strict=True)]


def part_of(x: jax.Array, start: Any, length: int) -> jax.Array:
    """Some members of a batch, the first of them at `start`, which is not negative."""
    return jax.lax.dynamic_slice_in_dim(x, start, length, allow_negative_indices=False)


def with_part(x: jax.Array, new: jax.Array, start: Any) -> jax.Array:
    """The batch with `new` as its members from `start` on, which is not negative."""
    return jax.lax.dynamic_update_slice_in_dim(x, new, start, 0, allow_negative_indices=False)


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def unjoin(
    batches: Sequence[jax.Array], lengths: Sequence[int], starts: Sequence[Any] = ()
) -> list[list[jax.Array]]:
    """Every batch split into parts of `lengths` along its first axis; `starts` as from `starts_of`."""
    if len(lengths) == 1:
        return [[batch] for batch in batches]
    places = list(zip(starts or starts_of(lengths, batches), lengths, strict=True))
    return [[part_of(batch, start, length) for start, length in places] for batch in batches]


def starts_of(lengths: Sequence[int], batches: Sequence[jax.Array]) -> Sequence[Any]:
    """Where the parts of these joint batches start.

    XLA compiles a kernel for every slice at a different constant offset, 12 ms each on CPU, but equal
    kernels only once; so there, for many slices, the starts are values that are unknown at compile time.
    """
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    seen = next((batch for batch in batches if batch.size), None)
    if len(lengths) <= 2 or platform() != "cpu" or seen is None:
        return starts
    return _unknown_to_the_compiler(starts, seen)


def _unknown_to_the_compiler(values: Sequence[int], seen_at_runtime: jax.Array) -> list[jax.Array]:
    """The same values, as results of a loop that runs once, which the compiler cannot predict."""
    one = after(jnp.int32(1), [seen_at_runtime])

    def body(carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        count, before = carry
        return count + 1, [value ^ 1 for value in before]

    # Exclusive or, because counters with equal increments would be merged into one.
    start = (jnp.int32(0), [jnp.int32(value ^ 1) for value in values])
    return jax.lax.while_loop(lambda carry: carry[0] < one, body, start)[1]
