"""`python -m lmms_smoothguard.lm_eval ...`: lm-eval's own command line, which then knows our model and our tasks by name."""

from __future__ import annotations

import sys

from lmms_smoothguard.errors import SmoothGuardError


def main() -> None:
    """All that lm-eval's `main` does. Says how to install lm-eval where it is missing; exits with 1 for an error of ours."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"{error}; expected lm-eval: pip install 'lmms-smoothguard[lm-eval]'")
    from lmms_smoothguard.harness.lm_eval import registering

    registering.register()
    registering.add_tasks()
    try:
        cli_evaluate()
    except SmoothGuardError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
