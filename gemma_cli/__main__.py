"""The program, also as `python -m gemma_cli`."""

import os
import signal


def main() -> None:
    """Loads the command line and runs it."""
    # While modules load there is nothing to tidy up, and a KeyboardInterrupt would show where it
    # came.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from gemma_cli.cli.main import main  # noqa: PLC0415

    main()


if __name__ == "__main__":
    main()
