"""`python -m draftsmith.eval` is `draftsmith eval`."""

import sys

from draftsmith.launch.cli import main

sys.argv.insert(1, "eval")
main()
