"""What a model's continuous inputs are: where the pixels stand, how they are laid out, how a request is tiled N times."""
