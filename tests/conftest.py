"""What has to be so before tests are imported, and the programs that they start."""

import os
import signal

import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background ignores
if not torch.cuda.is_available():
    # Triton's interpreter is chosen before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
