"""`python -m vitrail`, for torchrun and for machines whose PATH lacks the command."""

import sys

from vitrail.cli import main

if __name__ == "__main__":
    sys.exit(main())
