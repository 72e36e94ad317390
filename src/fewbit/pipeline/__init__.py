"""From a model to a compressed checkpoint: plan, calibrate, round, finish.

Each step is a function of files, so that a run can be killed and continued.
"""
