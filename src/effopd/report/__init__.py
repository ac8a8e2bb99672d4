"""Figures and pages, drawn from recorded rows and tables; no model is loaded."""
