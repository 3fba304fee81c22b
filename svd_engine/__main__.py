"""The command `svd-engine`, also as `python -m svd_engine`."""

import sys

from svd_engine.cli import INTERRUPTED, STOPPED


def main() -> None:
    """Run the command. Ctrl-C is one line also while its libraries are imported, for seconds."""
    try:
        from svd_engine.cli.main import main as run
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
