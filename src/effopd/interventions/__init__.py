"""Interventions: edit a model's update, evaluate the edited model, restore the base.

An *intervention* is one experiment (`alpha`, `window`, `rank`, …). A *point* is one edited model of
it.

edits.py           arithmetic on one matrix
options.py         settings of all interventions
points.py          Point: one model, as a rule for each matrix
kinds.py           table of the interventions
part_kinds.py      interventions that mix the parts of base and trained model
update_kinds.py    interventions that change the update
sources.py         base and trained checkpoints
editable_model.py  a model in memory, moved to a point and restored
results.py         rows and table in a folder
measure.py         evaluation of every point
linearity.py       KL along an update, predicted from two forwards
"""
