"""Code tasks: rows with tests, programs from answers, and their grading in a sandbox."""
