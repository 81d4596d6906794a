"""``python -m shardstep``. The guard matters: spawned ranks import this module again."""

import sys

from shardstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
