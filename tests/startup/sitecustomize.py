"""Read by every Python that the tests start: the garbage collector takes less of its time.

Importing torch makes a million objects that stay. To look among them for garbage takes a second while they are made
and another at the end of the process.
"""

import atexit
import gc

gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)
