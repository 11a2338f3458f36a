"""Safetensors checkpoints on disk: open and check them, write them atomically. Knows no merging."""

from merge3.checkpoint.read import Checkpoint, TensorInfo, open_checkpoint
from merge3.checkpoint.write import CheckpointWriter, check_free

__all__ = ["Checkpoint", "CheckpointWriter", "TensorInfo", "check_free", "open_checkpoint"]
