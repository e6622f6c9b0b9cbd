"""Results that are kept for the next calls with the same arguments."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Remembered(Generic[Result]):
    """`functools.lru_cache`, for local functions of optimizers that cloudpickle copies.

    Example:
      >>> from ravine.core.remembered import Remembered
      >>> Remembered(lambda x: x + 1, most=2)(1)
      2
    """

    def __init__(self, function: Callable[..., Result], most: int) -> None:
        self._function, self._most = function, most
        self._call = functools.lru_cache(maxsize=most)(function)

    def __call__(self, *arguments: Hashable) -> Result:
        """The result for these arguments, computed or kept."""
        return self._call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, (self._function, self._most)
