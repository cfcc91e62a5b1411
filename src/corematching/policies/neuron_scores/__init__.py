"""Neuron scores, one file each; every file of this folder is found and registered."""

from corematching.policies.component import import_all
from corematching.policies.neuron_scores.coreinfer import CoreInferScore
from corematching.policies.neuron_scores.griffin import GriffinScore
from corematching.policies.neuron_scores.magnitude import Magnitude
from corematching.policies.neuron_scores.output_weighted import OutputWeighted
from corematching.policies.neuron_scores.paper import PaperScore
from corematching.policies.neuron_scores.random import RandomNeurons

import_all(__name__, __path__)

__all__ = [
    "CoreInferScore",
    "GriffinScore",
    "Magnitude",
    "OutputWeighted",
    "PaperScore",
    "RandomNeurons",
]
