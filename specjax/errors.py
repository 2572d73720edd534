"""The one exception for mistakes of the user's, and how entry points report it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

EXIT_CODE = 2


class InputError(Exception):
    """Something the user gave is wrong: the message names the file, the field, the value and the remedy."""


def exit_on_input_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point: an InputError prints `error: ...` to stderr and exits with status 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None

    return wrapped
