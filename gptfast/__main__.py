"""`python -m gptfast` is the `gptfast` command."""

import sys

from gptfast.cli.__init__ import main

sys.exit(main())
