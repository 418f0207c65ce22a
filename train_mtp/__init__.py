"""Training: pre-training of small models and of multi-token-prediction (MTP) modules.

from train_mtp.config import PretrainConfig      what a run is told
from train_mtp.pretrain import pretrain          text in, HF checkpoint out
from train_mtp.evaluation import evaluate        bits per byte of held-out text
from train_mtp.plot import plot_runs             curves of several runs
"""
