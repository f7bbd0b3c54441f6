"""What the scripts share on the command line: one line for a mistake, exit code 2, no traceback."""

import argparse
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can mend; its message says how. Scripts print it as one line."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a bad command line costs one line of stderr, not the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def run_main(main):
    """Call `main()`; what a user can cause ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        rank = os.environ.get("RANK", "0")
        where = f"{Path(sys.argv[0]).name}: " + (f"rank {rank}: " if rank != "0" else "")
        print(f"{where}error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
