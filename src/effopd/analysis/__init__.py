"""What a training run did to the weights: spectra, directions, subspaces and entries of updates, as
tidy tables.
"""
