"""Public names for all private parts of TRL, transformers and accelerate that effopd uses.

    events    trainer events without a callback, from `attach` to `detach`
    hooks     overridden private methods, as `around_…` hooks that this package's trainers implement
    state     private attributes of a trainer, and of accelerate
    models    loading, placing and entering models
    kernels   the chunked divergence and log-probabilities

No training logic lives here. `tests/test_hosts.py` checks the installed hosts for every private
name in this folder, so upgrading a host changes only this folder and that test.
"""
