"""Methods for one purpose side by side: the same models, the same data, one table and one figure.

`neuropil compare compress` runs the comparison of compression and writes docs/compare-compress.md.
"""

from neuropil.compare.arms import ARMS, Arm
from neuropil.compare.page import load_outcomes, write
from neuropil.compare.run import Line, Outcome, lines, run
from neuropil.compare.subjects import SUBJECTS, Subject, subject

__all__ = ["ARMS", "SUBJECTS", "Arm", "Line", "Outcome", "Subject", "lines", "load_outcomes", "run", "subject", "write"]
