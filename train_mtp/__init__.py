"""Training: pre-training of small models and of multi-token-prediction (MTP) modules."""
