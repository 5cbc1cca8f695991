"""`python -m golf`: the command `golf`, also where it is not installed."""

import sys

from golf.command import main

sys.exit(main())
