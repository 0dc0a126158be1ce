"""``python -m moecap_eval``: the same as ``moecap``."""

import sys

from moecap_eval.cli import main

sys.exit(main())
