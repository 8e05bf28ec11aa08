"""Soft labels on disk: run a teacher once, train from its labels many times.

In the order of their use: :mod:`~bgkernels.labels.generation`, with
:mod:`~bgkernels.labels.translated` where the student has another tokenizer, or
:mod:`~bgkernels.labels.servers` for what an inference server returned;
:mod:`~bgkernels.labels.shard` and :mod:`~bgkernels.labels.store` (the files);
:mod:`~bgkernels.labels.dataset`.
"""

from bgkernels import SoftLabels, capture
from bgkernels.labels.dataset import LabelBatch, LabelDataset, collate
from bgkernels.labels.documents import Documents, read_documents
from bgkernels.labels.errors import CorruptLabels, LabelError
from bgkernels.labels.generation import CaptureConfig, generate
from bgkernels.labels.servers import read_sglang, read_vllm, save_documents
from bgkernels.labels.shard import Document
from bgkernels.labels.store import Info
from bgkernels.labels.tokenizer import fingerprint
from bgkernels.labels.translated import TranslatedSource

__all__ = [
    "CaptureConfig",
    "CorruptLabels",
    "Document",
    "Documents",
    "Info",
    "LabelBatch",
    "LabelDataset",
    "LabelError",
    "SoftLabels",
    "TranslatedSource",
    "capture",
    "collate",
    "fingerprint",
    "generate",
    "read_documents",
    "read_sglang",
    "read_vllm",
    "save_documents",
]
