"""The command, run in this process."""

from click.testing import CliRunner

from tilemla.cli import main


def tilemla(*words, answer=None):
    """What the command did; a crash is a crash of the test."""
    done = CliRunner().invoke(main, list(words), input=answer)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done
