"""How good a candidate is. A scorer is any callable `model → Score` (or a plain number; larger is
better).
"""
