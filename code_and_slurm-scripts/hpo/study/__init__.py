"""Where a study lives, and how its workers share it.

A study is one SQLite file, or in a PostgreSQL database, in Optuna's own tables, so that stock
Optuna of the tested version and optuna-dashboard may open it at any time.  Nobody directs the
workers.  Each of them, one per GPU,

1. claims a trial: a waiting one if there is one, otherwise a new one while the study has fewer
   than TOTAL_TRIALS.  The claim and the count are one transaction;
2. trains it, and reports after each epoch;
3. writes how it ended (COMPLETE, PRUNED or FAIL), and claims the next.

A slow trial holds up nobody but its own GPU.  A worker that has nothing left to claim waits for
the others, in case one of them dies.

Exactly once.  The study ends with TOTAL_TRIALS trials, numbered from 0, each finished once, however
many workers and jobs there were and however many of them died.  A claim gives a lease: the right to
report and to finish.  The worker renews it every few seconds, and every write renews and checks it
in the same transaction.  Whoever sees that a lease has not moved for LEASE_GRACE seconds of his own
clock gives the trial back to the queue, with its parameters and its finished epochs; so he does at
once where he knows that its job has left Slurm's queue.  The former holder, should it wake up, can
write no more.  A trial that has killed its worker three times is FAIL.

Where locks do not hold between nodes (check_cluster.py finds out), one process on the job's first
node opens the file, and the job's workers, who know its secret, reach it over the job's network.
The file belongs to that job until it ends; everybody else reads the backup.  If that process dies
it is started again, and the workers wait.

Backup.  While workers run, study.db.backup beside study.db is a whole copy, checked and at most a
minute old; of a study on a server it is an SQLite file beside the scripts, named after database and
study, which every program here opens.  A damaged study, or one that has lost trials, never replaces
it.  It is for readers: workers refuse it, and what shows it says how old it is.

A PostgreSQL server that is away is waited for: 15 s in each call, then as hpo/site.py says.

sqlite:///study.db is the file in the scripts' folder, whatever the current directory.  Other URLs
(mysql, journal, grpc) are Optuna's own storages, and only as good: the study may end with as many
trials too many as there are workers, less one; there is no backup; and the trial of a worker that
was killed stays RUNNING until `init_optuna_db.py --retry-stuck` gives back what shows no sign of
life.

Imported from outside are opening, trials, upkeep, optuna_private, storage for its errors, and
cache for what looks at each finished trial once (Follower):

    opening      STUDY_DB → a study, created or opened, and checked
    storage      the storage of the workers; its parts are held (the trials that this process
                 runs), studies, tables and cache, and under them leases and engines
    engines      what differs between SQLite and PostgreSQL
    copying      a study from one database to another, and from a server to its backup
    serving      a study that one process serves to the workers of its job
    upkeep       the thread that renews leases, returns dead workers' trials, makes the backup
    trials       what the trials add up to: counts, the total, the best, why some failed
    optuna_private   the names of Optuna that are not public, each held by a test
"""
