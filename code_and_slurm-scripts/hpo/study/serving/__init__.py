"""A study that one process serves, where locks do not hold between the nodes of a job.

served       a worker's side: the storage that asks, and who serves which file
server       the process that serves: python -m hpo.study.serving.server
own_server   STUDY_DB=postgresql:job: a PostgreSQL inside the job
"""
