"""`python -m tlauto` is `tlauto`."""

import sys


def main() -> None:
    """The command line, from its first import on: Ctrl-C ends it without a traceback."""
    try:
        from tlauto.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
