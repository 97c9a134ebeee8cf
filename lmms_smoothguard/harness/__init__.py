"""The defences and attacks inside evaluation harnesses."""
