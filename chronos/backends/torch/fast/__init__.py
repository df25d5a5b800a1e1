"""The same bits in less time: products, recorded steps and CUDA graphs."""
