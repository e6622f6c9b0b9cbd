"""Layouts: every leaf is converted to matrices and back bit for bit, and so are matrices to blocks."""

import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ravine.optimizers.matrix.shape.blocking import BlockGrid, block_grid
from ravine.optimizers.matrix.shape.layout import DEFAULT, MatrixAxes, layout

from .tolerances import UNIT

SIZES = {2: (1, 2, 3, 4, 6), 3: (1, 2, 3, 4, 6), 4: (1, 2, 3, 6)}  # by number of axes


def numbered(shape) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def divisors(size: int) -> list[int]:
    return [part for part in range(1, size + 1) if size % part == 0]


def every_choice(ndim: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways to assign each axis to rows, columns or the batch."""
    for sides in itertools.product("rcb", repeat=ndim):
        rows, columns = (tuple(a for a in range(ndim) if sides[a] == side) for side in "rc")
        if rows and columns:
            yield rows, columns


@pytest.mark.parametrize("ndim", SIZES)
def test_every_small_shape_and_choice_of_axes(ndim):
    rng = np.random.default_rng(ndim)
    for shape in itertools.product(SIZES[ndim], repeat=ndim):
        leaf = numbered(shape)
        for rows, columns in every_choice(ndim):
            rows, columns = (tuple(rng.permutation(side).tolist()) for side in (rows, columns))
            signs = [
                side if rng.integers(2) else tuple(a - ndim for a in side)
                for side in (rows, columns)
            ]
            M, N = (math.prod(shape[a] for a in side) for side in (rows, columns))
            p, q = int(rng.choice(divisors(M))), int(rng.choice(divisors(N)))
            found = layout(shape, MatrixAxes(*signs, p, q))
            (matrices,) = found.to_matrices(leaf)
            assert (
                found.pieces
                == (matrices.shape,)
                == ((leaf.size // (M * N) * p * q, M // p, N // q),)
            )
            np.testing.assert_array_equal(found.from_matrices([matrices]), leaf)
            # Follow one element by hand.
            at = rng.integers(shape)
            batch = [a for a in range(ndim) if a not in rows + columns]
            index, row, column = (
                np.ravel_multi_index(at[list(side)], [shape[a] for a in side]) if side else 0
                for side in (batch, rows, columns)
            )
            m, n = M // p, N // q
            k = (index * p + row // m) * q + column // n
            assert matrices[k, row % m, column % n] == leaf[tuple(at)]


@st.composite
def leaves_and_axes(draw):
    shape = tuple(draw(st.lists(st.sampled_from((*SIZES[2], 0)), min_size=2, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    first = draw(st.integers(1, len(shape) - 1))
    second = draw(st.integers(first + 1, len(shape)))
    sides = tuple(order[:first]), tuple(order[first:second])

    def parts(side):
        size = math.prod(shape[axis] for axis in side)
        if size and draw(st.booleans()):
            cuts = sorted(draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=3)) - {size})
            return tuple(b - a for a, b in itertools.pairwise([0, *cuts, size]))
        return draw(st.sampled_from(divisors(size) or [1, 2, 5]))

    return shape, MatrixAxes(*sides, *(parts(side) for side in sides))


@settings(deadline=None, max_examples=300)
@given(leaves_and_axes())
def test_any_parts_of_both_sides(case):
    shape, axes = case
    leaf, found = numbered(shape), layout(shape, axes)
    pieces = found.to_matrices(leaf)
    assert tuple(piece.shape for piece in pieces) == found.pieces
    assert sum(piece.size for piece in pieces) == leaf.size
    np.testing.assert_array_equal(found.from_matrices(pieces), leaf)
    # Each piece is a slice of the unsplit matrix, whatever the number of parts.
    (whole,) = layout(shape, MatrixAxes(axes.rows, axes.columns)).to_matrices(leaf)
    sizes = [
        part if isinstance(part, tuple) else (side // part,) * part
        for part, side in zip((axes.row_parts, axes.column_parts), whole.shape[1:], strict=True)
    ]
    expected = [
        block
        for strip in np.split(whole, np.cumsum(sizes[0])[:-1], axis=1)
        for block in np.split(strip, np.cumsum(sizes[1])[:-1], axis=2)
    ]
    if not leaf.size:
        return
    together = sorted(matrix.tolist() for piece in pieces for matrix in piece)
    assert together == sorted(matrix.tolist() for block in expected for matrix in block)


def test_heads_by_hand():
    kernel = numbered((2, 4))  # [in, heads * width]: two heads of width 2
    per_head = layout((2, 4), MatrixAxes((0,), (1,), column_parts=2))
    np.testing.assert_array_equal(
        per_head.to_matrices(kernel)[0], [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    )
    output = layout((4, 2), MatrixAxes((0,), (1,), row_parts=2))
    np.testing.assert_array_equal(
        output.to_matrices(numbered((4, 2)))[0], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    )
    # [in, heads, width] with layers at axis 1, in pairs of heads.
    query = layout((5, 3, 4, 2), MatrixAxes((0,), (2, 3), column_parts=2))
    assert query.pieces == ((6, 5, 4),)
    leaf = numbered((5, 3, 4, 2))
    np.testing.assert_array_equal(query.to_matrices(leaf)[0][3], leaf[:, 1, 2:].reshape(5, 4))


def test_fused_projections_by_hand():
    kernel = numbered((2, 5))
    q, k, v = layout((2, 5), MatrixAxes((-2,), (-1,), column_parts=(3, 1, 1))).to_matrices(kernel)
    np.testing.assert_array_equal(q, [[[0, 1, 2], [5, 6, 7]]])
    np.testing.assert_array_equal(k, [[[3], [8]]])
    np.testing.assert_array_equal(v, [[[4], [9]]])
    both = layout((3, 5), MatrixAxes((-2,), (-1,), row_parts=(2, 1), column_parts=(3, 2)))
    assert both.pieces == ((1, 2, 3), (1, 2, 2), (1, 1, 3), (1, 1, 2))
    mixed = layout((3, 4), MatrixAxes((-2,), (-1,), row_parts=(2, 1), column_parts=2))
    assert mixed.pieces == ((2, 2, 2), (2, 1, 2))
    np.testing.assert_array_equal(mixed.to_matrices(numbered((3, 4)))[1], [[[8, 9]], [[10, 11]]])


def test_a_convolution_is_the_matrix_it_multiplies_patches_by(getkey):
    image = jax.random.normal(getkey(), (1, 3, 3, 4))
    kernel = jax.random.normal(getkey(), (3, 3, 4, 5))
    (matrix,) = layout(kernel.shape, MatrixAxes((0, 1, 2), (3,))).to_matrices(kernel)
    expected = jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = image.reshape(1, -1) @ matrix[0]
    # Two sums of 36 products.
    bound = 2 * 36 * UNIT * (np.abs(image.reshape(1, -1)) @ np.abs(matrix[0]))
    assert np.all(np.abs(found - expected[0, 0]) <= bound)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 0, 3, 4), (0, 3, 4), (5, 2, 3, 4)])
def test_what_is_in_order_is_only_reshaped(shape):
    found = layout(shape)
    round_trip = lambda x: found.from_matrices(found.to_matrices(x))
    operations = {eqn.primitive.name for eqn in jax.make_jaxpr(round_trip)(jnp.zeros(shape)).eqns}
    assert operations <= {"reshape"}
    stacked = layout((2, 3, 4))
    assert not jax.make_jaxpr(stacked.to_matrices)(jnp.zeros((2, 3, 4))).eqns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_jit(dtype, getkey):
    shape = (6, 2, 4, 3)
    leaf = jax.random.normal(getkey(), shape, dtype)
    found = layout(shape, MatrixAxes((0,), (3, 2), row_parts=2, column_parts=(5, 7)))
    pieces = jax.jit(found.to_matrices)(leaf)
    assert tuple(piece.shape for piece in pieces) == found.pieces == ((4, 3, 5), (4, 3, 7))
    back = jax.jit(found.from_matrices)(pieces)
    assert back.dtype == leaf.dtype
    assert (np.asarray(back).view(np.uint8) == np.asarray(leaf).view(np.uint8)).all()
    assert hash(found) == hash(layout(shape, MatrixAxes((0,), (3, 2), 2, (5, 7))))


@pytest.mark.parametrize(
    ("shape", "axes", "problem"),
    [
        ((), DEFAULT, "fewer than two axes"),
        ((4,), DEFAULT, "fewer than two axes"),
        ((4, 6), MatrixAxes((-3,), (-1,)), "no axis -3"),
        ((4, 6), MatrixAxes((0,), (2,)), "no axis 2"),
        ((4, 6), MatrixAxes((), (1,)), "at least one axis"),
        ((4, 6), MatrixAxes((0,), ()), "at least one axis"),
        ((4, 6), MatrixAxes((0,), (-2,)), "names an axis twice; each is a row, a column or batch"),
        (
            (4, 6),
            MatrixAxes((0, -2), (1,)),
            "names an axis twice; each is a row, a column or batch",
        ),
        ((4, 6), MatrixAxes((0,), (1,), row_parts=3), "row_parts 3 does not divide its 4 rows"),
        ((4, 6), MatrixAxes((0,), (1,), column_parts=4), "column_parts 4 does not divide"),
        ((4, 6), MatrixAxes((0,), (1,), column_parts=(4, 1)), r"add up to 5, not to its 6"),
        (
            (4, 6),
            MatrixAxes((0,), (1,), column_parts=(7, -1)),
            "column_parts must be positive integers",
        ),
        ((4, 6), MatrixAxes((0,), (1,), column_parts=()), "column_parts must be positive integers"),
        ((4, 6), MatrixAxes((0,), (1,), row_parts=0), "row_parts must be positive integers"),
        ((4, 6), MatrixAxes((0,), (1,), row_parts=True), "row_parts must be positive integers"),
        ((4, 6), MatrixAxes((0,), (1,), row_parts=2.0), "row_parts must be positive integers"),
    ],
)
def test_bad_axes_are_refused_by_path_and_shape(shape, axes, problem):
    with pytest.raises(ValueError, match=problem) as error:
        layout(shape, axes, "layers/mlp/kernel")
    assert "'layers/mlp/kernel'" in str(error.value)
    assert str(shape) in str(error.value)


def test_other_shapes_are_refused():
    found = layout((2, 3, 4))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), got \(2, 4, 3\)"):
        found.to_matrices(np.zeros((2, 4, 3)))
    with pytest.raises(ValueError, match="pieces of shapes"):
        found.from_matrices([np.zeros((2, 4, 3))])
    with pytest.raises(ValueError, match="pieces of shapes"):
        found.from_matrices([])


@settings(deadline=None, max_examples=300)
@given(
    length=st.integers(0, 3),
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    block=st.none() | st.integers(1, 45),
)
def test_any_blocks(length, rows, columns, block):
    grid = block_grid((rows, columns), block)
    (R, C), (b, c) = grid.counts, grid.sizes
    bound = block or max(rows, columns)
    assert b <= bound
    assert c <= bound
    assert max(1, -(-rows // bound)) == R if rows else R == 1
    assert 0 <= R * b - rows < R  # no smaller block is enough
    assert 0 <= C * c - columns < C
    matrices = numbered((length, rows, columns)) + 1
    blocks = grid.to_blocks(matrices)
    assert blocks.shape == (length, R, C, b, c)
    assert int((blocks != 0).sum()) == matrices.size
    if blocks.size:
        assert grid.padding == pytest.approx((blocks == 0).mean())
    np.testing.assert_array_equal(grid.from_blocks(blocks), matrices)
    for i, j in itertools.product(range(R), range(C)):
        inside = matrices[:, i * b : (i + 1) * b, j * c : (j + 1) * c]
        np.testing.assert_array_equal(blocks[:, i, j, : inside.shape[1], : inside.shape[2]], inside)


def test_blocks_by_hand():
    grid = block_grid((3, 4), 2)
    assert grid == BlockGrid((3, 4), (2, 2), (2, 2))
    assert grid.padding == 0.25
    blocks = grid.to_blocks(numbered((1, 3, 4)))
    np.testing.assert_array_equal(
        blocks, [[[[[0, 1], [4, 5]], [[2, 3], [6, 7]]], [[[8, 9], [0, 0]], [[10, 11], [0, 0]]]]]
    )
    assert block_grid((28672, 8192), 1024).counts == (28, 8)
    assert block_grid((1025, 7), 1024).sizes == (513, 7)  # balanced: not 1024 and 1
    assert block_grid((9, 7)).sizes == (9, 7)
    assert block_grid((9, 7)).padding == 0.0
    uncut = block_grid((50_000, 768), 512, whole=(0,))
    assert (uncut.counts, uncut.sizes) == ((1, 2), (50_000, 384))


@pytest.mark.parametrize("sides", [(), (5,), (4, 3, 5), (2, 3, 4, 5)])
def test_blocks_of_any_order(sides):
    tensors, grid = numbered((2, *sides)) + 1, block_grid(sides, 2)
    blocks = grid.to_blocks(tensors)
    assert blocks.shape == (2, *grid.counts, *grid.sizes)
    np.testing.assert_array_equal(grid.from_blocks(blocks), tensors)
    for cell in itertools.product(*map(range, grid.counts)):
        cut = tuple(slice(at * b, (at + 1) * b) for at, b in zip(cell, grid.sizes, strict=True))
        inside = tensors[(slice(None), *cut)]
        block = blocks[(slice(None), *cell)]
        corner = tuple(slice(size) for size in inside.shape)
        np.testing.assert_array_equal(block[corner], inside)


def test_blocks_under_jit(getkey):
    matrices = jax.random.normal(getkey(), (2, 5, 7))
    grid = block_grid((5, 7), 3)
    blocks = jax.jit(grid.to_blocks)(matrices)
    np.testing.assert_array_equal(blocks, grid.to_blocks(np.asarray(matrices)))
    np.testing.assert_array_equal(jax.jit(grid.from_blocks)(blocks), matrices)


@pytest.mark.parametrize("block", [0, -1, True, 2.0])
def test_impossible_blocks_are_refused(block):
    with pytest.raises(ValueError, match="block must be at least 1"):
        block_grid((4, 4), block)


def test_matrices_of_another_grid_are_refused():
    grid = block_grid((3, 4), 2)
    with pytest.raises(ValueError, match=r"\(3, 4\)\], got \(1, 4, 3\)"):
        grid.to_blocks(np.zeros((1, 4, 3)))
    with pytest.raises(ValueError, match=r"\(2, 2, 2, 2\)\]"):
        grid.from_blocks(np.zeros((1, 2, 1, 2, 4)))
