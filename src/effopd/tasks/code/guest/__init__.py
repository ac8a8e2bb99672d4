"""Code inside the sandbox: standard library only, mounted read-only without the package."""
