"""Trainings of what defends: boosters and robust vision towers, resumable, with the model card that belongs to them."""
