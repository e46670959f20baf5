"""``python -m system.solve``: the ``solve`` command without the rest of the tool."""

import argparse
import sys

from system.errors import InstructMixError
from system.solve.command import add_arguments, run


def main() -> int:
    """Run the command; errors become one paragraph on stderr and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m system.solve")
    add_arguments(parser)
    args = parser.parse_args()
    try:
        return run(args)
    except InstructMixError as error:
        sys.stderr.write(f"instructmix: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
