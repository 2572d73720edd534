"""Block-diffusion training math: pure functions on arrays, importing nothing else of the package."""
