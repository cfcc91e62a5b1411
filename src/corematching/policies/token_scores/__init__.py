"""Token scores, one file each; every file of this folder is found and registered."""

from corematching.policies.component import import_all
from corematching.policies.token_scores.attention import Attention
from corematching.policies.token_scores.core_overlap import CoreOverlap
from corematching.policies.token_scores.norm import Norm
from corematching.policies.token_scores.projection import ProjectionScore
from corematching.policies.token_scores.random import RandomTokens
from corematching.policies.token_scores.text_overlap import TextOverlap
from corematching.policies.token_scores.token_overlap import TokenOverlap

import_all(__name__, __path__)

__all__ = [
    "Attention",
    "CoreOverlap",
    "Norm",
    "ProjectionScore",
    "RandomTokens",
    "TextOverlap",
    "TokenOverlap",
]
