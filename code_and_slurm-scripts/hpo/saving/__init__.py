"""How what a trial leaves is written and read; scripts use hpo/checkpoint.py instead.

states        the state of anything: taken from it, put back, and as plain data
trial_files   the files of a trial beside study.db: their names, written, read, removed
background    a file that is written while the trial goes on
"""
