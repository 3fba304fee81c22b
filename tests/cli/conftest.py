"""The command, run in this process."""

import io
import sys

import pytest

from svd_engine.cli import main, terminal


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["svd-engine", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        # rich looks for the terminal when a console is made, before pytest takes it over
        monkeypatch.setattr(terminal, "console", terminal.plain_console(width=300))
        monkeypatch.setattr(terminal, "errors", terminal.plain_console(stderr=True, width=300))
        try:
            main.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call
