"""Names of tensors in checkpoints from elsewhere: the one place that knows them.

Inside this project the names are those of the official Wan2.1 and Cosmos-Predict2 releases. What training frameworks
wrap around them is taken off here, and what is no weight is left out.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

OUTER = ("model", "state_dict", "module")  # keys under which a file may hold its one dict of tensors
WRAPPERS = (  # prefixes that the whole state may carry
    "net.",  # NVIDIA's rCM and Cosmos-Predict2 training state
    "module.",  # DistributedDataParallel
    "_orig_mod.",  # torch.compile
)
_NO_WEIGHT = re.compile(
    r"(^|\.)("
    r"_extra_state"  # TransformerEngine's, of FP8 training
    r"|pos_embedder\.(seq|dim_spatial_range|dim_temporal_range)"  # Cosmos' rotary ranges, computed at start
    r"|accum_(video_sample_counter|image_sample_counter|iteration|train_in_hours)"  # Cosmos' counters of its training
    r")$"
)
_FLATTENED = (
    "patch_embedding.weight"  # Wan: a Conv3d, in converted files a Linear of the same numbers in the same order
)


def is_weight(name: str) -> bool:
    """Whether a tensor of this name is a weight, rather than computed at start or a trainer's bookkeeping."""
    return _NO_WEIGHT.search(name) is None


def official(names: Iterable[str]) -> dict[str, str]:
    """Official name -> name in the file, of all weights: without the prefixes, also nested, that every one carries."""
    kept = {name: name for name in names if is_weight(name)}
    while prefix := next((p for p in WRAPPERS if kept and all(name.startswith(p) for name in kept)), None):
        kept = {name.removeprefix(prefix): stored for name, stored in kept.items()}
    return kept


def unflattened(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes in which a network wants tensors that the checkpoint `given` holds flattened, by name."""
    if _FLATTENED not in own or _FLATTENED not in given:
        return {}
    shape, flat = own[_FLATTENED].shape, given[_FLATTENED].shape
    return {_FLATTENED: shape} if len(flat) == 2 and flat == (shape[0], shape[1:].numel()) else {}
