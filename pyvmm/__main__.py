"""`python -m pyvmm` is the `pyvmm` program."""

from .lean import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` is loaded, which takes it back

from .cli import main

raise SystemExit(main())
