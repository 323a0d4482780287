"""`python -m quantkit.cli`."""

from quantkit.cli import main

main()
