"""Names of tensors in checkpoints from elsewhere: the one place that knows them.

Inside this project the keys are those of the official Wan2.1 and Cosmos-Predict2 releases. What training frameworks
wrap around them is taken off here.
"""

from collections.abc import Mapping

from torch import Tensor

WRAPPERS = (  # prefixes that the whole state may carry
    "net.",  # NVIDIA's rCM and Cosmos-Predict2 training state
    "module.",  # DistributedDataParallel
    "_orig_mod.",  # torch.compile
)


def unwrap(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off wrapper prefixes, also nested ones, that every key carries."""
    state = dict(state)
    while state:
        prefix = next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
