"""The booster (PSM, later GSB): a purifier before the vision tower and a mapper behind it, with the model frozen."""
