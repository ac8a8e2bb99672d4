"""Look ahead: when (schedule), where to (search), how good (scorers), moving live weights, the
callback.
"""
