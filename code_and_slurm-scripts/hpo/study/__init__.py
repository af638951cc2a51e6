"""Where a study lives.  Imported from outside: opening, trials, upkeep, storage (for its errors).

opening     STUDY_DB → a study, created or opened, and checked
storage     the Optuna storage for many workers on one SQLite file; held, studies, tables and
            cache are its parts, sqlite_file the file under it, leases the right to a trial
served      a worker's side, and server the process, where locks do not hold between nodes
upkeep      the thread that keeps a worker's lease, returns dead workers' trials, makes backups
trials      what the trials add up to: counts, total, best, reasons
"""
