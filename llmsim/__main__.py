"""`python -m llmsim` is the command `llmsim`."""

from llmsim.cli import entry

if __name__ == "__main__":
    entry()
