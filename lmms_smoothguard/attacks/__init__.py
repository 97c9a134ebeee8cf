"""White-box attacks on the model under test, through its own preprocessing."""
