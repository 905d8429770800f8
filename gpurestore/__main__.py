"""``python -m gpurestore``: the command line without an installed script."""

from gpurestore.cli import command

if __name__ == "__main__":
    command()
