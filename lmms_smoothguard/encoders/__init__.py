"""Other weights for a model's vision tower, such as the published robust CLIP encoders FARE and TeCoA."""

from lmms_smoothguard.encoders.loading import TowerProvenance, check_tower, load_vision_tower

__all__ = ["TowerProvenance", "check_tower", "load_vision_tower"]
