"""The one exception for what a user can cause."""


class GemmaError(Exception):
    """A failure that the user can mend.

    Its text is a full sentence that names the file, what is wrong with it and what to do. The
    command line prints it in one place and exits with a status of its own.
    """
