"""N answers in, one verdict out; knows nothing of models, attacks or harnesses."""
