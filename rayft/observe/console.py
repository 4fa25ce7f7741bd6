"""rayft's own messages on standard error, from the driver and from workers."""

from __future__ import annotations

import logging
import sys


def show_messages() -> None:
    """Show messages of the logger "rayft" from INFO up, once per process, unless the application has set up logging."""
    logger = logging.getLogger("rayft")
    if logger.handlers or logging.getLogger().handlers:
        return
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("rayft: %(message)s"))
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
