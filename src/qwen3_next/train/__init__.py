"""Training: packed documents in, published checkpoints out.

from qwen3_next.train import train
train("config.toml")
"""

from qwen3_next.train.config import TrainConfig
from qwen3_next.train.trainer import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
