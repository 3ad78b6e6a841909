"""``python -m lightning_hetero`` is the ``lightning-hetero`` command."""

import sys

from lightning_hetero.command.main import main

sys.exit(main())
