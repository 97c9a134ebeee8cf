"""Feature-space smoothing: a vision tower's forward becomes the mean of its features over noisy passes."""
