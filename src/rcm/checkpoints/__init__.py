"""Checkpoints: fetched and verified, read and written as .pth, DCP folder or safetensors export."""

from rcm.checkpoints.dcp import load_dcp, load_sharded, save_dcp
from rcm.checkpoints.download import download
from rcm.checkpoints.export import export_safetensors, read_export
from rcm.checkpoints.flat import State, load_into, state_sha256
from rcm.checkpoints.pth import load_pth, save_pth

__all__ = [
    "State",
    "download",
    "export_safetensors",
    "load_dcp",
    "load_into",
    "load_pth",
    "load_sharded",
    "read_export",
    "save_dcp",
    "save_pth",
    "state_sha256",
]
