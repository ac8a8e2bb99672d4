"""Built-in scorers. A scorer is a callable `model → Score | float`; larger is better."""
