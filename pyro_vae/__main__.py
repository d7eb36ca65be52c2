"""The program ``pyro-vae``, also run by ``python -m pyro_vae``."""

import sys


def main() -> None:
    """Run the command line, or exit with the name of the extra that installs it."""
    try:
        from pyro_vae import cli
    except ImportError as error:
        sys.exit(f"Error: {error}")
    cli.main()


if __name__ == "__main__":
    main()
