"""`python -m torchrelay`, and so `torchrun … -m torchrelay`, is the command line."""

import sys

from torchrelay.cli import main

sys.exit(main())
