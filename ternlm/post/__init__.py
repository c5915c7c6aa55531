"""After pretraining: fine-tuning and what comes after it; each is batches and a loss for `train`'s loop."""
