"""The checks of `gpu.py`, one function each.

A check takes the device's name, whether this is a rehearsal, and a folder for its files.
It returns its figures, and facts for the reader if it has any.
"""
