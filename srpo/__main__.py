import sys

from srpo.cli import main

sys.exit(main())
