"""`python -m pillsnap` is the `pillsnap` command."""
from pillsnap.cli import main

main()
