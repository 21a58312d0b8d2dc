import sys

from benchmarks.static.command import main

sys.exit(main(sys.argv[1:]))
