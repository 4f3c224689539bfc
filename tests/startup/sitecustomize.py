"""Read by every Python that the tests start: the garbage collector takes less of its time.

Importing torch makes a million objects that stay. To look among them for garbage takes a second while they are made and
another at the end of the process. nbdev_test draws figures as large as JupyterLab shows them, not with four times as
many pixels. Whatever reads notebooks imports jsonschema, which builds a grammar of web addresses for most of a second;
no schema here asks for one, and without the package jsonschema leaves that check out.
"""

import atexit
import gc
import sys
from functools import partialmethod

gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)
sys.modules["rfc3987_syntax"] = None
if any(word.endswith("/nbdev_test") for word in sys.orig_argv[:3]):
    from execnb.shell import CaptureShell

    CaptureShell.__init__ = partialmethod(CaptureShell.__init__, mpl_format="png")
