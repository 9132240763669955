"""What runs a frozen backbone over the images: the fastest engine that pays and is proven equal."""

from __future__ import annotations

from tlauto.training.engines.choice import Extractor
from tlauto.training.engines.converted import CONVERTERS, Converter
from tlauto.training.engines.fold import folded
from tlauto.training.engines.frozen import Engine, FrozenFeatures, same_features
from tlauto.training.engines.work import Work, measure_work

__all__ = [
    "CONVERTERS",
    "Converter",
    "Engine",
    "Extractor",
    "FrozenFeatures",
    "Work",
    "folded",
    "measure_work",
    "same_features",
]
