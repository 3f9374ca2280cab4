"""Checkpoints: fetched and verified, opened lazily, read and written as .pth, DCP folder, safetensors or diffusers'."""

from rcm.checkpoints.dcp import load_dcp, load_sharded, open_dcp, save_dcp
from rcm.checkpoints.download import download, verify
from rcm.checkpoints.export import export_diffusers, export_safetensors, read_export, read_settings
from rcm.checkpoints.flat import State, load_into, state_sha256
from rcm.checkpoints.lazy import LazyState, lazy
from rcm.checkpoints.opening import fitted, load_weights, open_state
from rcm.checkpoints.pth import load_pth, save_pth

__all__ = [
    "LazyState",
    "State",
    "download",
    "export_diffusers",
    "export_safetensors",
    "fitted",
    "lazy",
    "load_dcp",
    "load_into",
    "load_pth",
    "load_sharded",
    "load_weights",
    "open_dcp",
    "open_state",
    "read_export",
    "read_settings",
    "save_dcp",
    "save_pth",
    "state_sha256",
    "verify",
]
