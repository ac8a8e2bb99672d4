"""Output of a run: records, run directory, cost ledger, console lines, model card."""
