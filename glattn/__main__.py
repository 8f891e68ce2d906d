"""``python -m glattn``: the ``glattn`` command."""

import sys

from glattn.cli import main

sys.exit(main())
