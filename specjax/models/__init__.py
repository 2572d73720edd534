"""Models: NNX modules and their layouts; no file I/O, no training, no sampling."""
