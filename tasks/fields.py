"""What the fields of families have in common to be checked for."""

import dataclasses
from typing import Any


def positive_integers(family: Any, *names: str) -> None:
    """Sizes: of a field that is annotated `int` one (or None, where that may be), of others a tuple
    of them.

    Raises:
      ValueError: naming the first field that is something else.
    """
    annotations = {field.name: field.type for field in dataclasses.fields(family)}
    for name in names:
        value = getattr(family, name)
        if value is None and annotations[name] == int | None:
            continue
        one = annotations[name] in (int, int | None)
        sizes = (value,) if one else value
        if not isinstance(sizes, tuple) or not all(isinstance(s, int) and s > 0 for s in sizes):
            wanted = "a positive integer" if one else "a tuple of positive integers"
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}")
