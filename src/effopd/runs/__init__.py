"""What a run writes: records, run directory, cost ledger, console, model card."""
