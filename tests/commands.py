"""The commands as a person meets them, in this process: exit code and what they print."""

import contextlib
import io
import logging
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """As subprocess.run gives it."""

    returncode: int
    stdout: str
    stderr: str


def client(*arguments):
    """merge3-client with these arguments."""
    from merge3.client.cli import run

    return _captured(run, arguments)


def server(*arguments):
    """merge3-server with these arguments."""
    from merge3_server.cli import run

    logger = logging.getLogger("merge3")  # `serve` takes it over, as the one command of a process may
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    try:
        return _captured(run, arguments)
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _captured(run, arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())
