"""The pictures of a report: what is drawn, from which trials, and how it is written.

pictures       each picture of a study, by Optuna's functions or our own; any of them may fail
distribution   how many trials reached a value
timeline       when which worker ran what, and how busy they were
sample         fewer trials where there are too many to draw
chart          one picture as PNG, PDF and a part of the page
"""
