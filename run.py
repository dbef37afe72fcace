"""The command `robe`, from a clone: `python run.py COMMAND --help` explains each command."""

from robe.cli import main

if __name__ == "__main__":
    main()
