"""`python -m pyvmm` is the `pyvmm` program."""

from .cli import main

raise SystemExit(main())
