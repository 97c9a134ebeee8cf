"""An example of a distribution that adds to lmms-smoothguard."""
