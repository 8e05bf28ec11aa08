"""Ten short documents, and a teacher that labels them."""

from __future__ import annotations

from bgkernels.labels import CaptureConfig
from bgkernels.training import ModelShape, models

VOCAB = 60
CONFIG = CaptureConfig(k=7, temperature=2.0, gamma=0.3, batch_size=3, documents_per_shard=4)
LENGTHS = (5, 1, 8, 3, 0, 6, 2, 7, 4, 8)  # three shards
DOCUMENTS = [[(7 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate(LENGTHS)]


class Tokenizer:
    def __init__(self, shift=0):
        self.shift = shift

    def get_vocab(self):
        return {f"word{(i + self.shift) % VOCAB}": i for i in range(VOCAB)}


def make_teacher(vocab=VOCAB):
    model = models.small_llama(ModelShape(16, 1, 2), vocab, length=8, seed=1)
    model.network.lm_head.weight.data.mul_(5)  # opinions
    model.freeze()
    return model
