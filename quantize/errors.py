"""The one exception for what a user can cause, and how it shows what stands in a file."""

import re
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3

# Characters without width, blanks that are letters, and those that turn the order around (Unicode
# Standard Annex 9). Joiners belong to the writing of some languages, so they count as such only
# beside ASCII.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
    "|(?<![^\0-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\0-\x7f])"
)


class GemmaError(Exception):
    """A failure that the user can mend.

    Its text is a full sentence that names the file, what is wrong with it and what to do. The
    command line prints it in one place and exits with a status of its own.
    """


def visible(text: str) -> str:
    """A text with names in it as it is to be read: what one would not see in it is spelled out."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def shown(value: object) -> str:
    """A value that a file holds, for a message: on one line, printable, and short even where a
    name of a megabyte or lists in lists stand."""
    try:
        return visible(_SHORT.repr(value))
    except ValueError:  # Python writes no more than 4300 digits.
        return "a number of thousands of digits"
