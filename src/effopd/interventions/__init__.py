"""Move one model along its update, evaluate it there, put it back.

An *intervention* is one kind of question (`alpha`, `window`, `rank`, …); a *point* is one model
that it visits.

edits.py           the arithmetic on one matrix
options.py         settings of all interventions
points.py          Point: one model, as a rule for each matrix
kinds.py           the interventions and their points; part_kinds.py mixes the parts of two models, update_kinds.py changes
                   the update
sources.py         the base and the trained checkpoints
editable_model.py  one model in memory, put at a point and back
results.py         rows and table of a folder
measure.py         evaluate the model at every point
"""
