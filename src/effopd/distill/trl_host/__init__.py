"""The one door to TRL, transformers and accelerate: each of their private names that this package
uses, under a name of ours.

    events    what a trainer does but tells no callback, from `attach` to `detach`
    hooks     overridden private methods, as `around_…` hooks that our trainers implement
    state     private attributes of a trainer, and of accelerate
    models    loading, placing and entering models
    kernels   the chunked divergence and log-probabilities

Nothing is decided here. `tests/test_hosts.py` checks the installed hosts for every private name in
this folder, so that an upgrade of a host changes this folder and that test only.
"""
