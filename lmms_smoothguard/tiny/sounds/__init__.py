"""The embedded audio model: generated recordings, what is said about them, training and test sets."""
