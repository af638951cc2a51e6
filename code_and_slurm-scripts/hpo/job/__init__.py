"""What a job is made of: the phases of the batch script, and small programs that it runs.

job.sh, task.sh, successor.sh   the phases;  one task of them;  the job that follows
keep_running.sh, keep_serving.sh  a worker, and the process that serves a study, kept alive
own_server.sh                   STUDY_DB=postgresql:job: a PostgreSQL for the job alone
mps.sh, venv.sh                 several workers on a GPU;  the environment of a workstation
hidden                          no file beside the scripts hides a module
begin, count, estimate          is all there to begin;  how far the study is;  what a job will cost
meeting                         files by which the tasks of a job exchange what the preflight finds
return_trials                   the trials of a worker that has died
"""
