"""`python -m convsim_cli`: the command line."""

from convsim_cli.cli import main

if __name__ == "__main__":
    main()
