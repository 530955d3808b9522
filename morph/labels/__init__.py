"""What a teacher said of each image, on disk: multi-channel labels as bits, and logits; and training from them."""

from __future__ import annotations

from morph.labels.caches import LabelCache as LabelCache
from morph.labels.caches import LogitCache as LogitCache
from morph.labels.extraction import extract_labels as extract_labels
from morph.labels.extraction import extract_logits as extract_logits
from morph.labels.samples import LabelledSamples as LabelledSamples
from morph.labels.targets import WithTargets as WithTargets
