import sys

from draftsmith.train import main

sys.exit(main(sys.argv[1:]))
