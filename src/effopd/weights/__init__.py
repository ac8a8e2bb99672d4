"""Checkpoints on disk: place, read and compare tensors one at a time, and write edited copies."""

from effopd.weights.adapter import Adapter
from effopd.weights.difference import Difference, Update, open_differences
from effopd.weights.naming import MODULES, Place
from effopd.weights.parts import Part
from effopd.weights.reader import Checkpoint, open_checkpoint
from effopd.weights.trajectory import Ending, Snapshot, ending_of, find_snapshots
from effopd.weights.writer import write_checkpoint

__all__ = [
    "MODULES",
    "Adapter",
    "Checkpoint",
    "Difference",
    "Ending",
    "Part",
    "Place",
    "Snapshot",
    "Update",
    "ending_of",
    "find_snapshots",
    "open_checkpoint",
    "open_differences",
    "write_checkpoint",
]
