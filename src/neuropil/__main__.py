"""`python -m neuropil`, and `torchrun -m neuropil`: the same as the command `neuropil`."""

from neuropil.cli import main

if __name__ == "__main__":
    main()
