"""`python -m lmms_smoothguard` is `smoothguard`."""

from lmms_smoothguard.cli import main

main()
