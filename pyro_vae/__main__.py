"""The program ``pyro-vae``, which is also ``python -m pyro_vae``."""

import sys


def main() -> None:
    """Run the command line, or say which extra installs it."""
    try:
        from pyro_vae import cli
    except ImportError as error:
        sys.exit(f"Error: {error}")
    cli.main()


if __name__ == "__main__":
    main()
