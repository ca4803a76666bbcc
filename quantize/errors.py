"""The one exception for what a user can cause, and how it shows what stands in a file."""

from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


class GemmaError(Exception):
    """A failure that the user can mend.

    Its text is a full sentence that names the file, what is wrong with it and what to do. The
    command line prints it in one place and exits with a status of its own.
    """


def shown(value: object) -> str:
    """A value that a file holds, for a message: on one line, printable, and short even where a
    name of a megabyte or lists in lists stand."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no more than 4300 digits.
        return "a number of thousands of digits"
