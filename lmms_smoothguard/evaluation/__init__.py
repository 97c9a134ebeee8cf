"""Rates with intervals, and runs read back from a harness's logs."""
