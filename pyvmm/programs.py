"""Programs that do one thing while we wait for it: compilers, package tools.

It owns the process until its end.  An exception that a signal's handler raises kills it, and cannot
come between its start and the moment in which it has an owner.  It does not know what they do.
"""

from __future__ import annotations

from .ending import held, release

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def run(argv: Sequence[str], folder: str | None = None) -> tuple[int, str, str]:
    """Run `argv` in `folder` (default: where we are); exit status, standard output and standard error.

    Raises OSError when there is no such program.
    """
    from subprocess import PIPE, Popen

    process = None
    try:
        with held():
            process = Popen(
                argv, cwd=folder, stdout=PIPE, stderr=PIPE, text=True, errors="replace",
                preexec_fn=release,  # noqa: PLW1509 - of two system calls, and before there are threads
            )  # fmt: skip
        output, errors = process.communicate()
        return process.returncode, output, errors
    except BaseException:
        if process is not None:
            with process:
                process.kill()
        raise
