"""`python -m ggtool` is the `ggtool` command."""

from ggtool.cli import main

if __name__ == "__main__":
    main()
