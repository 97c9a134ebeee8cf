"""Our attacks beside those of adversarial-robustness-toolbox and torchattacks, on one model under one protocol."""
