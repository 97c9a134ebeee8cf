"""Runs through lmms-eval's own command line, and what they come to: tables and result files."""
