"""Weight updates of training runs as tidy tables: spectra, directions, subspaces and entries."""
