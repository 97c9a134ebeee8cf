"""Runs a module or a file as if our package were not installed for anybody's entry points: `python hidden_plugin.py CODE`."""

import importlib.metadata
import itertools
import sys

own = importlib.metadata.entry_points


def without_ours(**selection):
    found = own(**selection)
    if isinstance(found, dict):  # Python 3.11's, of all groups
        found = itertools.chain.from_iterable(found.values())
    return importlib.metadata.EntryPoints([one for one in found if not one.value.startswith("lmms_smoothguard")])


if __name__ == "__main__":
    importlib.metadata.entry_points = without_ours
    exec(compile(sys.argv[1], "<code>", "exec"))
