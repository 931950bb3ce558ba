"""Networks: encoder, decoders, DiffMAE, classifier, and their weights."""
