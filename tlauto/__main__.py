"""`python -m tlauto` is `tlauto`."""

from tlauto.cli import main

main()
