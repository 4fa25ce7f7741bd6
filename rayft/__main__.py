"""`python -m rayft`."""

from rayft.cli import main

raise SystemExit(main())
