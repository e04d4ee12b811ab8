"""`python -m ggtool` is the `ggtool` command."""

from ggtool.cli.app import main

if __name__ == "__main__":
    main()
