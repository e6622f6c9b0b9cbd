"""Options in words, as a command line has them: ``name=value``, separated by commas."""

from collections.abc import Collection

from ..core.checks import near


def parse_numbers(text: str, known: Collection[str], what: str) -> dict[str, float]:
    """Numbers by name.

    Args:
      text: ``name=value`` pairs, separated by commas.
      known: the names there are.
      what: one of them, in a complaint: ``field of Policy``.

    Raises:
      ValueError: for other names or one that comes twice, and for what is no number.

    Example:
      >>> from ravine.training.words import parse_numbers
      >>> parse_numbers("every=50, margin=2e1", ["every", "margin"], "field of Policy")
      {'every': 50.0, 'margin': 20.0}
    """
    numbers: dict[str, float] = {}
    for pair in filter(None, (word.strip() for word in text.split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if name not in known:
            raise ValueError(f"{name!r} is no {what}; {near(name, known)}")
        if not equals:
            raise ValueError(f"{name} has no value; write {name}=NUMBER.")
        if name in numbers:
            raise ValueError(f"{name} is given twice; give it once.")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}.") from None
    return numbers
