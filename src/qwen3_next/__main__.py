"""`python -m qwen3_next`, which `torchrun -m` starts several of: the command line."""

import sys

from qwen3_next.cli import main

if __name__ == "__main__":
    sys.exit(main())
