"""What every op means: plain PyTorch, any dtype, the oracle of the tests and the backend that is always there."""
