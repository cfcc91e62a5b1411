"""Token scores, one file each; every file of this folder is found and registered."""

from corematching.policy.component import import_all
from corematching.policy.token_scores.attention import Attention
from corematching.policy.token_scores.core_overlap import CoreOverlap
from corematching.policy.token_scores.norm import Norm
from corematching.policy.token_scores.projection import ProjectionScore
from corematching.policy.token_scores.random import RandomTokens
from corematching.policy.token_scores.text_overlap import TextOverlap
from corematching.policy.token_scores.token_overlap import TokenOverlap

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
