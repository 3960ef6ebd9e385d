"""The only package that sees data: training, evaluation and privacy at a client."""
