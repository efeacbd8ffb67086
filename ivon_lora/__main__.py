"""`python -m ivon_lora` is the same as `ivon-lora`."""

import sys

from ivon_lora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
