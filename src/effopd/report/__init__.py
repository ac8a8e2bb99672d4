"""Tables to figures. Figures read rows only, never models."""
