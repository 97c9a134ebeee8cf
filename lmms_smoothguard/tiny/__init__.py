"""The embedded default: generated scenes, a small trained LLaVA, its training and its test sets."""
