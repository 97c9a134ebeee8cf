"""Sweeps: a grid of defences and attacks on one model, answered once and voted on in every way."""
