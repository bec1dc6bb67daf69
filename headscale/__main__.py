"""`python -m headscale`: the same program as `headscale`."""

from headscale.cli import main

if __name__ == "__main__":
    main()
