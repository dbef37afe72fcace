"""AdaEmbed (Lai et al., OSDI 2023): only important ids have rows, all others of a feature share one.

Which ids are important follows the training, by the norms of their gradients, as in cafe.py, of which this is
the case of one hashed row a feature: all else that is given goes to the rows of hot ids, and to the sketch
that finds them. The paper prunes rows from time to time, by counters of all ids; here a sketch takes their
part, which counts few of them, and a row changes hands as soon as another id is more important.
"""

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.cafe import hashed_behind
from robe.embeddings.sketched import HOT, SketchedEmbedding, SketchedWeights, weights_of_a_set
from robe.embeddings.tables import largest


def declare(config: TrainConfig, data: DataSpec) -> dict[str, SketchedWeights]:
    width, features = config.model.width, len(data.cardinalities)

    def size(sets: int) -> int:
        return features * width + sets * weights_of_a_set(width)

    sets = largest(size, -(-sum(data.cardinalities) // HOT), config, data)
    rows = np.array([sets * HOT, *[1] * features])
    return {"": SketchedWeights(rows, width, sets=sets, features=features)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> SketchedEmbedding:
    return hashed_behind(declare(config, data)[""], config, data, backend, dtype)
