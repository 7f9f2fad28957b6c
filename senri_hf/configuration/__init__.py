"""What a memory and a model are made of: settings, checked when they are made."""

from .bank import BankConfig
from .compressive import CompressiveConfig
from .episodic import EpisodicConfig


__all__ = ["BankConfig", "CompressiveConfig", "EpisodicConfig"]
