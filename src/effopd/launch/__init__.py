"""From settings to a running trainer: checks, dry run, memory estimate, launch."""
