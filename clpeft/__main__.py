"""`python -m clpeft` is `clpeft`."""

from clpeft.cli import main

main()
