"""Trainings around a given model: boosters with the model frozen, robust vision towers."""
