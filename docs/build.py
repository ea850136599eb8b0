"""`make docs`: write the generated parts of the documentation (see neuropil/docs.py)."""

import sys

from neuropil.docs import main

if __name__ == "__main__":
    sys.exit(main())
