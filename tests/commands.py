"""Commands of the command line, run in the test's own process."""

import pytest

from cluster import cli


def run(*arguments, code=0, capsys=None):
    """Runs a command in this process; returns what it wrote to stdout and stderr."""
    if code == 0:
        cli.main([str(a) for a in arguments])
    else:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in arguments])
        assert stopped.value.code == code
    return capsys.readouterr() if capsys else None
