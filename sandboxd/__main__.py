"""`python -m sandboxd`: the command line."""

from __future__ import annotations

from sandboxd.cli.main import entry

if __name__ == "__main__":
    entry()
