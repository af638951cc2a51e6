"""What people look at: progress, the report and its pictures, tables, the exported model.

progress             --watch: a study, live
report, page, facts  --report: the page, its HTML, and what stands in it besides pictures
figures              the pictures of a report
trial_table          the trials as a table, and --csv
compare              --compare: studies side by side
results              what a study's own script says of a trial;  export, code: --export, --retrain
model_file           --export of what a framework has written itself
"""
