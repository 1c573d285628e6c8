import sys

from draftsmith.launch.training import main

sys.exit(main(sys.argv[1:]))
